"""Health as grpc's own service has it, for any number of who asks."""

from typing import Any

import grpc
from grpc_health.v1 import health

MOST_UNKNOWN, LONGEST = 256, 256
"""Names that nobody has reported on and somebody watches, since the start: the service remembers each for ever."""


class HealthService(health.HealthServicer):
    """A name that is not known yet may be watched until it is, but there is an end to how many."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[str] = {""}
        self._unknown: set[str] = set()

    def set(self, service: str, status: int) -> None:
        self._known.add(service)
        super().set(service, status)

    def Watch(self, request: Any, context: grpc.ServicerContext, send_response_callback: Any = None) -> Any:
        name = request.service
        if name not in self._known:
            if len(name) > LONGEST or (name not in self._unknown and len(self._unknown) >= MOST_UNKNOWN):
                context.abort(grpc.StatusCode.NOT_FOUND, "service: expected one of this server's, or a policy's name")
            self._unknown.add(name)
        return super().Watch(request, context, send_response_callback)
