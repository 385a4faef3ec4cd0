"""Bytes that are no message are the caller's mistake: INVALID_ARGUMENT, where grpc itself would answer INTERNAL."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos.errors import Rejected


@dataclass(frozen=True)
class _Unreadable:
    """Stands in for a request that could not be parsed."""

    size: int


class Parser(grpc.ServerInterceptor):
    """Refuses what does not parse, through the same door as every other refusal."""

    def __init__(self, refuse: Callable[[str, Rejected, grpc.ServicerContext], None]) -> None:
        self._refuse = refuse

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler
        parse, behave, method = handler.request_deserializer, handler.unary_unary, details.method.rpartition("/")[2]

        def parse_or_mark(content: bytes) -> Any:
            try:
                return parse(content)
            except DecodeError:
                return _Unreadable(len(content))

        def behave_or_refuse(request: Any, context: grpc.ServicerContext) -> Any:
            if isinstance(request, _Unreadable):
                got = f"{request.size} bytes that are none"
                self._refuse(method, Rejected("request", "a protobuf message", got, "is it the right method?"), context)
            return behave(request, context)

        return grpc.unary_unary_rpc_method_handler(behave_or_refuse, parse_or_mark, handler.response_serializer)
