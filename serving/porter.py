"""Refuses at the door: the message of a call that the model has no room for is neither handed over nor parsed."""

import functools
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import RETRY, Rejected, Status
from serving.answering import PATHS, Answering
from serving.dispatcher import Dispatcher
from serving.parsing import kind_of, method_of
from serving.security import Gate, closed

log = logging.getLogger(__name__)

OURS = f"/{pb.DESCRIPTOR.package}."
NO_MESSAGE = "request: expected one message, got none"
ACTING = frozenset(PATHS[method] for method in ("GetAction", "GetActionBatch"))
ASKING = frozenset(PATHS[method] for method in ("StartEpisode", "ListPolicies", "GetPolicy", "GetStats"))
"""Held to a rate beside who acts; what ends something, an episode or the server, is not."""

NO_THREAD = Rejected(
    "server", "a thread that is free for health and reflection", "none", "ask less often", Status.RESOURCE_EXHAUSTED
)

AWAITED = 8
"""Calls of one client whose message has not come: a thread waits for each, and nobody may take all of those."""
LINE = 64
"""Calls that may wait for a thread of health's or reflection's: they count among the server's calls at once."""
MESSAGE_S, QUESTION_S, STREAM_S = 15.0, 3.0, 60.0
"""Whose message has not come by then is cancelled: several clients together could take all threads, too. 4 MiB at 2
Mbit/s take as long; what asks for health or reflection is short. A whole stream of reflection may last so long."""
CROWDED_S = 1.0
"""Where half of the robots' threads have waited so long, all calls that have are cancelled: a frame of 64 KiB takes as
long at 0.5 Mbit/s."""


class _Wait(NamedTuple):
    """For a call's message: since when and until when (time.monotonic), and whether it takes a robots' thread."""

    since: float
    until: float
    of_robots: bool


class Porter(grpc.ServerInterceptor):
    """Asks for room before a message is read, unless the call says that it is a second try: its answer may be at hand.

    To gRPC a method is one with a stream of requests, of which it reads one; on the wire that is the same. What is not
    ours, health and reflection, has threads of its own, and its streams others than its checks: nobody waits for a
    thread that a stream holds. Where all of those are taken and LINE calls wait for them, more are refused. From
    `start` to `close`, a thread looks for messages that do not come.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        gate: Gate,
        answering: Answering,
        *,
        threads: int,
        checks: "Threads",
        streams: "Threads",
    ) -> None:
        """`threads`: of robots' calls; `checks`, `streams`: those of the others."""
        self._dispatcher, self._gate, self._answering = dispatcher, gate, answering
        self._threads, self._checks, self._streams = threads, checks, streams
        self._awaited: dict[str, int] = {}
        """Calls of each client whose message has not come."""
        self._due: dict[grpc.ServicerContext, _Wait] = {}
        """Of each call whose message has not come."""
        self._handlers: dict[str, Any] = {}
        """Of each method that there is, made when it is called first."""
        self._lock, self._closed = threading.Lock(), threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._cancel_the_late, name="porter", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler, path = continuation(details), details.method
        if handler is None:
            return handler
        pool = None if path.startswith(OURS) else self._streams if handler.unary_unary is None else self._checks
        if pool is not None and pool.full:
            # On a robots' thread, for a moment: in a pool's line, it would count among the calls at once.
            return closed(handler, functools.partial(self._answering.refuse, method_of(path), NO_THREAD))
        if path not in self._handlers:
            self._handlers[path] = self._guarded(handler, path, pool)
        return self._handlers[path]

    def _guarded(self, handler: Any, path: str, pool: "Threads | None") -> Any:
        if handler.unary_unary is not None:
            handler = self._waiting(handler, path)
        elif handler.response_streaming:
            handler = self._patient(handler, path)
        return handler if pool is None else _on(pool, handler)

    def _waiting(self, handler: Any, path: str) -> Any:
        method, behave = method_of(path), handler.unary_unary
        ours = path.startswith(OURS)
        within_s = MESSAGE_S if ours else QUESTION_S

        def enter(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            try:
                client, metadata = context.peer(), context.invocation_metadata() or ()
                if ours:
                    client = self._gate.require(path, metadata) or client
                if self._answering.draining:
                    pass  # who drains says so
                elif path in ACTING:
                    self._dispatcher.admit(client, repeats=any(key == RETRY for key, _ in metadata))
                elif path in ASKING:
                    self._dispatcher.admit_question(client)
                self._begin_to_wait(client, context, within_s, of_robots=ours)
            except Rejected as rejected:
                self._answering.refuse(method, rejected, context)
            except Exception:
                self._answering.fail(method, context)
            return behave(self._only_message(requests, context, client), context)

        return grpc.stream_unary_rpc_method_handler(enter, handler.request_deserializer, handler.response_serializer)

    def _patient(self, handler: Any, path: str) -> Any:
        """A method with a stream of replies, whose caller does not keep a thread waiting for what he asks.

        Of one connection AWAITED may wait for a message: a watch for its first, a stream of reflection while it lasts.
        """
        behave = handler.stream_stream or handler.unary_stream

        def messages(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            first = next(requests, None)
            if first is not None:
                self._wait_on(context, STREAM_S)  # also while an answer is sent, to who may not take it
                yield first
                yield from requests

        def enter(requests: Iterator[Any], context: grpc.ServicerContext, *send: Any) -> Any:
            peer = context.peer()
            try:
                self._begin_to_wait(peer, context, QUESTION_S)
            except Rejected as rejected:
                self._answering.refuse(method_of(path), rejected, context)
            if handler.unary_stream is None:
                if not context.add_callback(lambda: self._end_wait(peer, context)):
                    self._end_wait(peer, context)
                return behave(messages(requests, context), context, *send)
            return behave(self._only_message(requests, context, peer), context, *send)

        enter.__dict__.update(getattr(behave, "__dict__", {}))  # whether it answers by callback
        return grpc.stream_stream_rpc_method_handler(enter, handler.request_deserializer, handler.response_serializer)

    def _only_message(self, requests: Iterator[Any], context: grpc.ServicerContext, client: str) -> Any:
        """Of a call of `client` that has begun to wait."""
        try:
            request = next(requests, None)
        except grpc.RpcError as error:
            # The caller has left. gRPC keeps this error, and its traceback would keep the call and its message.
            error.with_traceback(None)
            request = None
        finally:
            self._end_wait(client, context)
        if request is None:  # or who called is gone: gRPC does not say which, so it is not counted
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
        return request

    def _cancel_the_late(self) -> None:
        while not self._closed.wait(QUESTION_S / 4):
            with self._lock:
                late = self._late(time.monotonic())
            for context in late:
                context.cancel()
            if late:
                log.info("%d calls were cancelled: their messages did not come", len(late))

    def _late(self, now: float) -> list[grpc.ServicerContext]:
        long = {c for c, wait in self._due.items() if wait.of_robots and now - wait.since >= CROWDED_S}
        crowded = len(long) >= self._threads / 2
        return [c for c, wait in self._due.items() if now >= wait.until or (crowded and c in long)]

    def _begin_to_wait(
        self, client: str, context: grpc.ServicerContext, within_s: float, *, of_robots: bool = False
    ) -> None:
        with self._lock:
            waiting = self._awaited.get(client, 0)
            if waiting >= AWAITED:
                expected = f"at most {AWAITED} calls of one client whose message has not come"
                remedy = "send each call's message before the next call"
                raise Rejected("server", expected, f"{AWAITED + 1}", remedy, Status.RESOURCE_EXHAUSTED)
            self._awaited[client] = waiting + 1
            now = time.monotonic()
            self._due[context] = _Wait(now, now + within_s, of_robots)

    def _wait_on(self, context: grpc.ServicerContext, within_s: float) -> None:
        with self._lock:
            if context in self._due:  # else the call is over
                self._due[context] = self._due[context]._replace(until=time.monotonic() + within_s)

    def _end_wait(self, client: str, context: grpc.ServicerContext) -> None:
        with self._lock:
            del self._due[context]
            self._awaited[client] -= 1
            if not self._awaited[client]:
                del self._awaited[client]


class Threads(ThreadPoolExecutor):
    """So many threads, and a line of LINE before them."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._most = count + LINE
        self._taken, self._taking = 0, threading.Lock()

    @property
    def full(self) -> bool:
        return self._taken >= self._most

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._taking:
            self._taken += 1
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: self._leave())
        return future

    def _leave(self) -> None:
        with self._taking:
            self._taken -= 1


def _on(pool: Threads, handler: Any) -> Any:
    """The same method, on threads of that pool: gRPC looks for it at the function."""
    kind = kind_of(handler)
    behave = getattr(handler, kind)
    there = functools.partial(behave)
    there.__dict__.update(getattr(behave, "__dict__", {}), experimental_thread_pool=pool)
    return handler._replace(**{kind: there})
