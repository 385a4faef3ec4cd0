"""One call from its arrival to its status: who asks, how long he waits, and every refusal as one gRPC status."""

import functools
import itertools
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import LONGEST, REQUEST_ID, Rejected, Status, cut
from serving.logs import Throttle
from serving.metrics import Metrics, Phases
from serving.security import Gate
from serving.tracing import Tracer
from serving.turn import Caller, seconds_until

log = logging.getLogger(__name__)

DOMAIN = "equiserve"
PATHS = {
    method: f"/{service.full_name}/{method}"
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods_by_name
}
"""Of each method."""
FINISHING = frozenset({"EndEpisode"})
"""What is taken though the server drains: how an episode went is known here alone, and no next server is told."""
LATE_S, LATE_SHARE = 0.005, 0.01
"""Who has left with no more time than this, and this share of what he had, had met his deadline: it is kept by gRPC's
clock, not by ours, and comes rounded up to 10 ms from a second on, and to 100 ms from ten."""
SAFE_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class Arrival(NamedTuple):
    """When a call's headers came (time.perf_counter), and how long it waited for a thread."""

    at: float
    pool_s: float


class Call:
    """One call on its way."""

    def __init__(self, context: grpc.ServicerContext, client: str, request_id: str, arrival: Arrival | None) -> None:
        self.client, self.request_id, self.phases = client, request_id, Phases()
        self.arrived, self.pool_s = arrival or Arrival(time.perf_counter(), 0.0)
        remaining = context.time_remaining()
        self.expires_at = math.inf if remaining is None else time.monotonic() + remaining
        self._late_s = LATE_S + LATE_SHARE * (self.elapsed_s + (remaining or 0.0))
        self._context = context
        self._over_at: float | None = None
        """When it ended for gRPC, as far as that was noted (time.monotonic)."""

    @property
    def elapsed_s(self) -> float:
        """Since it arrived: the wait for a thread and for its message included."""
        return time.perf_counter() - self.arrived

    @property
    def patience_s(self) -> float:
        return seconds_until(self.expires_at)

    def status(self, said: str) -> str:
        """What the caller sees of a call that is told `said`: who has left meanwhile sees how he left."""
        if self._context.is_active():
            return said
        return "DEADLINE_EXCEEDED" if self.is_late else "CANCELLED"

    @property
    def is_late(self) -> bool:
        """Whether the caller's time was over when he left; or is now, or before he can be told anything."""
        return self.expires_at - (self._over_at or time.monotonic()) < self._late_s

    def caller(self, within_s: float, *, last_turn: bool = False) -> Caller:
        """Who waits for the model: until his deadline, and no longer than `within_s`."""
        replied = threading.Event() if last_turn else None
        if replied:

            def end() -> None:
                self._over_at = time.monotonic()
                replied.set()

            if not self._context.add_callback(end):
                end()
        return Caller(self.client, min(self.expires_at, time.monotonic() + within_s), self._context.is_active, replied)


class _Status(NamedTuple):
    """grpc.Status, with the request's id beside the details."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


class Answering:
    """What all methods share: identity, counting, and refusals that name the field, what was expected and what came."""

    def __init__(
        self, metrics: Metrics, gate: Gate, tracer: Tracer, arrival: Callable[[], Arrival | None] = lambda: None
    ) -> None:
        self.metrics, self._gate, self.tracer, self._arrival = metrics, gate, tracer, arrival
        self.draining = False
        self._prefix, self._count = uuid.uuid4().hex[:8], itertools.count(1)
        self._throttle, self._failures = Throttle(), Throttle()  # a flood of refusals must not hide a failure

    @contextmanager
    def __call__(self, method: str, context: grpc.ServicerContext) -> Iterator[Call]:
        """Turn what goes wrong into one gRPC status, and count the call under it. No traceback leaves the server."""
        refusal, call = None, self._call(context)
        with self.tracer.span(method, call.request_id) as span:
            try:
                call.client = self._gate.require(PATHS[method], context.invocation_metadata()) or call.client
                if self.draining and method not in FINISHING:
                    remedy = "call another server, or wait for the next"
                    raise Rejected("server", "one that takes calls", "one that drains", remedy, Status.UNAVAILABLE)
                yield call
            except Rejected as rejected:
                # Its traceback leads back to here, and so to itself: the message would be kept until a collection.
                refusal = rejected.with_traceback(None)
            except Exception:
                refusal = self._unforeseen(method, call)
            status = call.status(refusal.status.value if refusal else "OK")
            span.end(call.phases, status)
        if refusal:
            self._refuse(method, refusal, context, call, status)
        else:
            self.metrics.record(method, status, call.elapsed_s, call.phases)

    def fail(self, method: str, context: grpc.ServicerContext) -> None:
        """Where an exception is handled that nobody foresaw, before the call reached its method."""
        call = self._call(context)
        failure = self._unforeseen(method, call)
        self._refuse(method, failure, context, call, call.status(failure.status.value))

    def refuse(self, method: str, rejected: Rejected, context: grpc.ServicerContext) -> None:
        """Where a call is refused before it reached its method."""
        call = self._call(context)
        status = call.status(rejected.status.value)
        with self.tracer.span(method, call.request_id) as span:
            span.end(call.phases, status)
        self._refuse(method, rejected, context, call, status)

    def _refuse(self, method: str, rejected: Rejected, context: grpc.ServicerContext, call: Call, status: str) -> None:
        """Count, log and answer a refusal of which the caller sees `status`."""
        self.metrics.record(method, status, call.elapsed_s, call.phases)
        if self._throttle.allows():
            left_out = self._throttle.left_out()
            log.info(
                "%s refused, %s: %s%s", method, status,
                rejected if status == rejected.status.value else "the caller had left",
                f" ({left_out} more refusals were not written)" if left_out else "",
                extra={"request_id": call.request_id, "client": call.client, "field": rejected.field},
            )  # fmt: skip
        told = _status(rejected.field, rejected.expected, rejected.got, rejected.remedy, rejected.status)
        trailing = (*told.trailing_metadata, (REQUEST_ID, call.request_id))
        context.abort_with_status(_Status(told.code, told.details, trailing))

    def _unforeseen(self, method: str, call: Call) -> Rejected:
        """Log the exception that is being handled; the caller is told no more than where to find it."""
        told = f"tell its operator: request {call.request_id}"
        if self._failures.allows():
            left_out = self._failures.left_out()
            more = f" ({left_out} more failures were not written)" if left_out else ""
            log.exception("%s: request %s failed%s", method, call.request_id, more)
            told = f"the server's log has it under request {call.request_id}"
        return Rejected("server", "no failure", "an internal error", told, Status.INTERNAL)

    def _call(self, context: grpc.ServicerContext) -> Call:
        return Call(context, context.peer(), self._request_id(context.invocation_metadata()), self._arrival())

    def _request_id(self, metadata: object) -> str:
        """The caller's own, if it is one, or a new one."""
        for key, value in metadata or ():  # type: ignore[attr-defined]
            if key == REQUEST_ID and isinstance(value, str) and SAFE_ID.fullmatch(value):
                return value
        return f"{self._prefix}-{next(self._count)}"


@functools.lru_cache(64)
def _status(field: str, expected: str, got: str, remedy: str, status: Status) -> grpc.Status:
    """An overload refuses with the same words thousands of times."""
    return rpc_status.to_status(status_of(Rejected(field, expected, got, remedy, status)))


def status_of(rejected: Rejected) -> status_pb2.Status:
    """google.rpc.Status with a BadRequest for people's tools and an ErrorInfo (field, expected, got) for programs."""
    parts = {name: getattr(rejected, name) for name in ("field", "expected", "got", "remedy")}
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=parts["field"], description=f"expected {parts['expected']}, got {parts['got']}"
    )
    details = [any_pb2.Any(), any_pb2.Any()]
    details[0].Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    details[1].Pack(error_details_pb2.ErrorInfo(reason=rejected.status.value, domain=DOMAIN, metadata=parts))
    return status_pb2.Status(
        code=code_pb2.Code.Value(rejected.status.value), message=cut(str(rejected), 2 * LONGEST), details=details
    )
