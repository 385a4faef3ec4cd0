"""Bytes that are no message are the caller's mistake: INVALID_ARGUMENT, where grpc itself would answer INTERNAL."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected
from serving.wire import Part, parts

MAX_BATCH_ITEMS = 256
SHORT_BYTES = 128 * 1024
"""What any message takes that holds no frame, a contract (protos.spaces has its bound) and limits included. While one
is parsed no other call goes on: of 4 MiB of limits it would be a quarter of a second, of empty items one second."""
MOST_FIELDS = 64
"""Of a request for an action, its observation's among them: three times as many as there are."""
REQUESTS = pb.GetActionBatchRequest.DESCRIPTOR.fields_by_name["requests"].number
OBSERVATION = pb.GetActionRequest.DESCRIPTOR.fields_by_name["observation"].number
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
        many = Rejected("requests", f"1 to {MAX_BATCH_ITEMS} items", "many more")
        inside = _Few(MOST_FIELDS * MAX_BATCH_ITEMS)
        for item in _Few(2 * MAX_BATCH_ITEMS, many).of(parts(content)):  # half of them may be a later contract's
            if item.is_bytes and item.number == REQUESTS:
                inside.require(content, item.begin, item.end)
    elif method == "GetAction":
        if len(content) > LARGE_BYTES:
            _Few(MOST_FIELDS).require(content, 0, len(content))
    elif len(content) > SHORT_BYTES:
        raise Rejected("request", f"at most {SHORT_BYTES} bytes", str(len(content)))


class _Few:
    """So many fields and no more, of all the messages together that it is asked about: also the search takes time."""

    def __init__(self, most: int, many: Rejected | None = None) -> None:
        self._left = most
        self._many = many or Rejected("request", f"at most {most} fields", "many more", "send each field once")

    def of(self, found: Iterator[Part]) -> Iterator[Part]:
        """Raises Rejected behind the last that there may be."""
        for part in found:
            if not self._left:
                raise self._many
            self._left -= 1
            yield part

    def require(self, content: bytes, begin: int, end: int) -> None:
        """Count those of the GetActionRequest that lies there, and of its observation: protobuf takes the time for each
        that comes again, and keeps the last."""
        for field in self.of(parts(content, begin, end)):
            if field.is_bytes and field.number == OBSERVATION:
                for _ in self.of(parts(content, field.begin, field.end)):
                    pass
