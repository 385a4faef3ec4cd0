"""Health as grpc's own service has it, for any number of who asks, and for peers that do not listen."""

import threading
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health

MOST_UNKNOWN, LONGEST = 256, 256
"""Names that nobody has reported on and somebody watches, since the start: the service remembers each for ever."""
MOST_WATCHERS = 64
"""At once: each takes a thread, which sleeps."""


class HealthService(health.HealthServicer):
    """A name that is not known yet may be watched until it is, but there is an end to how many, and to who watches.

    grpc's own service sends to watchers while it holds its lock, and a peer that takes nothing (an HTTP/2 window of 0)
    would keep it: no check would be answered any more, and no drain would end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: set[str] = {""}
        self._unknown: set[str] = set()
        self._room = threading.BoundedSemaphore(MOST_WATCHERS)

    def set(self, service: str, status: int) -> None:
        self._known.add(service)
        super().set(service, status)

    def Watch(self, request: Any, context: grpc.ServicerContext, send_response_callback: Any = None) -> Any:
        name = request.service
        if name not in self._known:
            if len(name) > LONGEST or (name not in self._unknown and len(self._unknown) >= MOST_UNKNOWN):
                context.abort(grpc.StatusCode.NOT_FOUND, "service: expected one of this server's, or a policy's name")
            self._unknown.add(name)
        if not self._room.acquire(blocking=False):
            told = f"server: expected at most {MOST_WATCHERS} watchers of health, got one more; ask by Check"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, told)
        letters = _Letters(send_response_callback, self._room.release)
        super().Watch(request, context, letters.put)
        if not context.is_active():  # it ended before anybody could hear of its end
            self._on_close_callback(letters.put, name)()

    def _on_close_callback(self, send_response_callback: Any, service: str) -> Any:
        def forget() -> None:
            with self._lock:
                self._send_response_callbacks[service].discard(send_response_callback)
            send_response_callback(None)

        return forget


class _Letters:
    """The latest status for one watcher, told by a thread of its own: who puts it does not wait for who takes it."""

    def __init__(self, send: Callable[[Any], object], ended: Callable[[], object]) -> None:
        self._send, self._ended = send, ended
        self._latest: list[Any] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._deliver, name="health", daemon=True).start()

    def put(self, status: Any) -> None:
        """None: the call has ended."""
        with self._changed:
            if self._latest != [None]:
                self._latest = [status]
            self._changed.notify()

    def _deliver(self) -> None:
        try:
            while (status := self._next()) is not None:
                self._send(status)
        finally:
            self._ended()

    def _next(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._latest)
            return self._latest.pop()
