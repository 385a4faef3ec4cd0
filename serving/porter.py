"""Refuses at the door: the message of a call that the model has no room for is neither handed over nor parsed."""

import functools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from protos.errors import RETRY, Rejected, Status
from serving.answering import Answering
from serving.dispatcher import Dispatcher
from serving.security import Gate

OURS = "/equiserve.v1."
NO_MESSAGE = "request: expected one message, got none"
ACTING = frozenset(f"{OURS}PolicyService/{method}" for method in ("GetAction", "GetActionBatch"))

AWAITED = 8
"""Calls of one client whose message has not come: a thread waits for each, and nobody may take all of those."""
MESSAGE_S = 3.0
"""Whose message has not come by then is cancelled: many clients together could take all threads, too."""


class Porter(grpc.ServerInterceptor):
    """Asks for room before a message is read, unless the call says that it is a second try: its answer may be at hand.

    To gRPC a method is one with a stream of requests, of which it reads one; on the wire that is the same. What is not
    ours, health and reflection, has threads of its own, and its streams others than its checks: nobody waits for a
    thread that a stream holds. `close` ends the thread that looks for messages which do not come.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        gate: Gate,
        answering: Answering,
        *,
        checks: ThreadPoolExecutor,
        streams: ThreadPoolExecutor,
    ) -> None:
        self._dispatcher, self._gate, self._answering = dispatcher, gate, answering
        self._checks, self._streams = checks, streams
        self._awaited: Counter[str] = Counter()
        self._since: dict[grpc.ServicerContext, float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._cancel_the_late, name="porter", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        if handler is None:
            return handler
        pool = self._streams
        if handler.unary_unary is not None:
            handler, pool = self._waiting(handler, details), self._checks
        elif handler.response_streaming:
            handler = self._patient(handler)
        return handler if details.method.startswith(OURS) else _on(pool, handler)

    def _waiting(self, handler: Any, details: grpc.HandlerCallDetails) -> Any:
        method, behave = details.method.rpartition("/")[2], handler.unary_unary
        acts = details.method in ACTING
        repeats = any(key == RETRY for key, _ in details.invocation_metadata or ())

        def enter(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            try:
                client = context.peer()
                if acts:
                    client = self._gate.require(details.method, details.invocation_metadata) or client
                    if not self._answering.draining:  # who drains says so
                        self._dispatcher.admit(client, repeats=repeats)
                self._begin_to_wait(client)
            except Rejected as rejected:
                self._answering.refuse(method, rejected, context)
            except Exception:
                self._answering.fail(method, context)
            try:
                with self._awaiting(context):
                    request = next(requests, None)
            finally:
                self._end_wait(client)
            if request is None:  # or who called is gone: gRPC does not say which, so it is not counted
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
            return behave(request, context)

        return grpc.stream_unary_rpc_method_handler(enter, handler.request_deserializer, handler.response_serializer)

    def _patient(self, handler: Any) -> Any:
        """A method with a stream of replies, whose caller does not keep a thread waiting for what he asks."""
        behave = handler.stream_stream or handler.unary_stream

        def messages(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            while True:
                with self._awaiting(context):
                    request = next(requests, None)
                if request is None:
                    return
                yield request

        def enter(requests: Iterator[Any], context: grpc.ServicerContext, *send: Any, **how: Any) -> Any:
            asked: Any = messages(requests, context)
            if handler.unary_stream is not None and (asked := next(asked, None)) is None:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
            return behave(asked, context, *send, **how)

        enter.__dict__.update(getattr(behave, "__dict__", {}))  # whether it answers by callback
        return grpc.stream_stream_rpc_method_handler(enter, handler.request_deserializer, handler.response_serializer)

    @contextmanager
    def _awaiting(self, context: grpc.ServicerContext) -> Iterator[None]:
        with self._lock:
            self._since[context] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._since[context]

    def _cancel_the_late(self) -> None:
        while not self._closed.wait(MESSAGE_S / 4):
            with self._lock:
                late = [c for c, since in self._since.items() if time.monotonic() - since >= MESSAGE_S]
            for context in late:
                context.cancel()

    def _begin_to_wait(self, client: str) -> None:
        with self._lock:
            if self._awaited[client] >= AWAITED:
                expected = f"at most {AWAITED} calls of one client whose message has not come"
                remedy = "send each call's message before the next call"
                raise Rejected("server", expected, f"{AWAITED + 1}", remedy, Status.RESOURCE_EXHAUSTED)
            self._awaited[client] += 1

    def _end_wait(self, client: str) -> None:
        with self._lock:
            self._awaited[client] -= 1
            if not self._awaited[client]:
                del self._awaited[client]


def _on(pool: ThreadPoolExecutor, handler: Any) -> Any:
    """The same method, on threads of that pool: gRPC looks for it at the function."""
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        if (behave := getattr(handler, kind)) is not None:
            there = functools.partial(behave)
            there.__dict__.update(getattr(behave, "__dict__", {}), experimental_thread_pool=pool)
            return handler._replace(**{kind: there})
    return handler
