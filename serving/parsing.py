"""Bytes that are no message are the caller's mistake: INVALID_ARGUMENT, where grpc itself would answer INTERNAL."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos.errors import Rejected

LARGE_BYTES = 128 * 1024
"""Twice what a frame of 128 x 128 takes: whether a message holds more than its fields is not worth asking before."""


@dataclass(frozen=True)
class _Unreadable:
    """Stands in for a request that could not be parsed."""

    size: int


def method_of(path: str) -> str:
    """The name of the method at "/package.Service/Method"."""
    return path.rpartition("/")[2]


def kind_of(handler: Any) -> str:
    """Which attribute of a method's handler holds its function."""
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    return next(kind for kind in kinds if getattr(handler, kind) is not None)


class Parser(grpc.ServerInterceptor):
    """Refuses what does not parse, through the same door as every other refusal.

    And forgets what no field of ours is: a megabyte of it would be kept with a step, and recorded.
    """

    def __init__(self, refuse: Callable[[str, Rejected, grpc.ServicerContext], None]) -> None:
        self._refuse = refuse
        self._handlers: dict[str, Any] = {}
        """Of each method that there is, made when it is called first."""

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        if handler is not None and details.method not in self._handlers:
            self._handlers[details.method] = self._careful(handler, method_of(details.method))
        return self._handlers.get(details.method)

    def _careful(self, handler: Any, method: str) -> Any:
        parse = handler.request_deserializer

        def parse_or_mark(content: bytes) -> Any:
            try:
                message = parse(content)
            except DecodeError:
                return _Unreadable(len(content))
            message.DiscardUnknownFields()
            if len(content) > LARGE_BYTES:  # protobuf forgets them, and keeps their bytes as long as the message lives
                kept = message.SerializeToString()
                message = parse(kept) if len(kept) < len(content) else message
            return message

        def read(request: Any, context: grpc.ServicerContext) -> Any:
            if isinstance(request, _Unreadable):
                got = f"{request.size} bytes that are none"
                self._refuse(method, Rejected("request", "a protobuf message", got, "is it the right method?"), context)
            return request

        kind = kind_of(handler)
        behave = getattr(handler, kind)

        def behave_or_refuse(asked: Any, context: grpc.ServicerContext, *send: Any) -> Any:
            asked = (read(one, context) for one in asked) if handler.request_streaming else read(asked, context)
            return behave(asked, context, *send)

        behave_or_refuse.__dict__.update(getattr(behave, "__dict__", {}))  # whether it answers by callback
        return handler._replace(request_deserializer=parse_or_mark, **{kind: behave_or_refuse})
