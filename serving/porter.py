"""Refuses at the door: the message of a call that the model has no room for is neither handed over nor parsed."""

from collections.abc import Iterator
from typing import Any

import grpc

from protos.errors import RETRY, Rejected
from serving.answering import Answering
from serving.dispatcher import Dispatcher
from serving.security import Gate

ACTING = frozenset(f"/equiserve.v1.PolicyService/{method}" for method in ("GetAction", "GetActionBatch"))


class Porter(grpc.ServerInterceptor):
    """Asks for room before a message is read, unless the call says that it is a second try: its answer may be at hand.

    To gRPC the method is one with a stream of requests, of which it reads one; on the wire that is the same.
    """

    def __init__(self, dispatcher: Dispatcher, gate: Gate, answering: Answering) -> None:
        self._dispatcher, self._gate, self._answering = dispatcher, gate, answering

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        if handler is None or details.method not in ACTING:
            return handler
        method, behave = details.method.rpartition("/")[2], handler.unary_unary
        repeats = any(key == RETRY for key, _ in details.invocation_metadata or ())

        def enter(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            try:
                client = self._gate.require(details.method, details.invocation_metadata) or context.peer()
                if not self._answering.draining:  # who drains says so
                    self._dispatcher.admit(client, repeats=repeats)
            except Rejected as rejected:
                self._answering.refuse(method, rejected, context)
            except Exception:
                self._answering.fail(method, context)
            request = next(requests, None)
            if request is None:  # or who called is gone: gRPC does not say which, so it is not counted
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "request: expected one message, got none")
            return behave(request, context)

        return grpc.stream_unary_rpc_method_handler(enter, handler.request_deserializer, handler.response_serializer)
