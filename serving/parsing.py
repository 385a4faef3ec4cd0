"""Bytes that are no message are the caller's mistake: INVALID_ARGUMENT, where grpc itself would answer INTERNAL."""

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos.errors import Rejected

MAX_BATCH_ITEMS = 256
SHORT_BYTES = 128 * 1024
"""What any message takes that holds no frame, a contract (protos.spaces has its bound) and limits included. While one
is parsed no other call goes on: of 4 MiB of limits it would be a quarter of a second, of empty items one second."""
_VARINT, _BYTES, _FIXED, _LONGEST_VARINT = 0, 2, {1: 8, 5: 4}, 10
"""How a field's wire type says where it ends; of a group, which is out of use, the begin and the end are counted."""
LARGE_BYTES = 128 * 1024
"""Twice what a frame of 128 x 128 takes: whether a message holds more than its fields is not worth asking before."""


def method_of(path: str) -> str:
    """The name of the method at "/package.Service/Method"."""
    return path.rpartition("/")[2]


def kind_of(handler: Any) -> str:
    """Which attribute of a method's handler holds its function."""
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    return next(kind for kind in kinds if getattr(handler, kind) is not None)


class Parser(grpc.ServerInterceptor):
    """Refuses what does not parse, or would take long to, through the same door as every other refusal.

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

        def parse_or_refuse(content: bytes) -> Any:
            try:
                _require_little(content, method)
                message = parse(content)
            except DecodeError:
                got = f"{len(content)} bytes that are none"
                return Rejected("request", "a protobuf message", got, "is it the right method?")
            except Rejected as rejected:
                return rejected.with_traceback(None)
            message.DiscardUnknownFields()
            if len(content) > LARGE_BYTES:  # protobuf forgets them, and keeps their bytes as long as the message lives
                kept = message.SerializeToString()
                message = parse(kept) if len(kept) < len(content) else message
            return message

        def read(request: Any, context: grpc.ServicerContext) -> Any:
            if isinstance(request, Rejected):
                self._refuse(method, request, context)
            return request

        kind = kind_of(handler)
        behave = getattr(handler, kind)

        def behave_or_refuse(asked: Any, context: grpc.ServicerContext, *send: Any) -> Any:
            asked = (read(one, context) for one in asked) if handler.request_streaming else read(asked, context)
            return behave(asked, context, *send)

        behave_or_refuse.__dict__.update(getattr(behave, "__dict__", {}))  # whether it answers by callback
        return handler._replace(request_deserializer=parse_or_refuse, **{kind: behave_or_refuse})


def _require_little(content: bytes, method: str) -> None:
    """Raises Rejected where to parse it would take long, DecodeError where that would fail."""
    if method == "GetActionBatch":
        if not has_at_most(2 * MAX_BATCH_ITEMS, content):  # half of them may be a later contract's
            raise Rejected("requests", f"1 to {MAX_BATCH_ITEMS} items", "many more")
    elif method != "GetAction" and len(content) > SHORT_BYTES:
        raise Rejected("request", f"at most {SHORT_BYTES} bytes", str(len(content)))


def has_at_most(count: int, content: bytes) -> bool:
    """Whether a protobuf message has no more fields, each item of a repeated one counted (protobuf.dev, "Encoding").

    Raises:
        DecodeError: where one of the first has no end.
    """
    at = 0
    for _ in range(count):
        if at == len(content):
            break
        tag, at = _varint(content, at)
        wire = tag & 7
        if wire == _BYTES:
            size, at = _varint(content, at)
            at += size
        elif wire == _VARINT:
            at = _varint(content, at)[1]
        else:
            at += _FIXED.get(wire, 0)
        if at > len(content):
            raise DecodeError("a field is longer than its message")
    return at == len(content)


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    number = 0
    for place, byte in enumerate(content[at : at + _LONGEST_VARINT]):
        number |= (byte & 127) << (7 * place)
        if byte < 128:
            return number, at + place + 1
    raise DecodeError("a number has no end")
