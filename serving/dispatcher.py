"""Who gets the model next: a short line, shared fairly between clients, before a fixed number of inferences.

It has no thread of its own: the thread that answers a call runs its inference when its turn has come, and hands its
place to the next in line. With `max_batch` > 1 it also takes along who waits for the same policy; nobody ever waits
for a batch to fill, so a lone client pays nothing for it.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos.errors import Rejected, Status
from protos.spaces import Observation
from serving.policy import Policy, Proposal


@dataclass(frozen=True)
class Caller:
    """Whose call it is, until when an answer is of use (time.monotonic seconds), and whether it still wants one."""

    name: str
    expires_at: float
    alive: Callable[[], bool]

    @property
    def gone(self) -> bool:
        return time.monotonic() >= self.expires_at or not self.alive()


@dataclass(frozen=True)
class Turn:
    """What the policy said of each observation, and where the time went."""

    proposals: Sequence[Proposal]
    queue_s: float
    inference_s: float


@dataclass(eq=False)
class _Ticket:
    caller: Caller
    policy: Policy
    observations: Sequence[Observation]
    leads: bool = False
    """Holds one of the places before the model, and runs it."""
    expired: bool = False
    outcome: "Turn | BaseException | None" = None
    came: float = field(default_factory=time.perf_counter)
    called: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.called.acquire()  # released when there is news: a place, an answer, or that it is too late


class Dispatcher:
    """Runs at most `concurrency` inferences at once and lets at most `queue` calls wait.

    No client can take all of either, where there is more than one: who floods, floods himself.
    """

    def __init__(self, concurrency: int, queue: int, max_batch: int = 1) -> None:
        self._concurrency, self._queue, self._max_batch = concurrency, queue, max_batch
        self._lock = threading.Lock()
        self._line: deque[_Ticket] = deque()
        self._running: Counter[str] = Counter()
        self._in_use = 0
        self.expired = 0
        """Calls that left the line without an answer: the model was never asked for them."""

    @property
    def running(self) -> int:
        return self._in_use

    @property
    def waiting(self) -> int:
        return len(self._line)

    def act(self, policy: Policy, observations: Sequence[Observation], caller: Caller) -> Turn:
        """The policy's proposals, in turn.

        Raises:
            Rejected: RESOURCE_EXHAUSTED at once when the line is full; DEADLINE_EXCEEDED when the caller's time ran
                out, or he left, before his turn came.
        """
        ticket = _Ticket(caller, policy, observations)
        with self._lock:
            if caller.gone:
                self.expired += 1
                raise _too_late()
            if not self._may_start(caller.name):
                self._require_room(caller.name)
                self._line.append(ticket)
            else:
                self._start(ticket)
        if not ticket.called.acquire(timeout=_patience_s(caller)):
            with self._lock:
                if ticket in self._line:
                    self._line.remove(ticket)
                    self._expire(ticket)
            ticket.called.acquire()  # its turn may have come in the last moment
        if ticket.expired:
            raise _too_late()
        if ticket.leads:
            self._lead(ticket)
        if isinstance(ticket.outcome, BaseException):
            raise ticket.outcome
        assert ticket.outcome is not None
        return ticket.outcome

    def require_room(self, name: str) -> None:
        """Refuse before any work is done, if `act` would now. Raises Rejected, RESOURCE_EXHAUSTED."""
        with self._lock:
            if not self._may_start(name):
                self._require_room(name)

    def _may_start(self, name: str) -> bool:
        share = max(1, self._concurrency - 1)
        return self._in_use < self._concurrency and self._running[name] < share

    def _start(self, ticket: _Ticket) -> None:
        ticket.leads = True
        self._in_use += 1
        self._running[ticket.caller.name] += 1
        ticket.called.release()

    def _require_room(self, name: str) -> None:
        for gone in [t for t in self._line if t.caller.gone]:
            self._line.remove(gone)
            self._expire(gone)
        own, share = sum(t.caller.name == name for t in self._line), max(1, self._queue - 1)
        if len(self._line) >= self._queue or own >= share:
            full = len(self._line) >= self._queue
            expected = f"at most {self._queue if full else share} waiting calls{'' if full else ' of one client'}"
            got, remedy = f"{(len(self._line) if full else own) + 1}", "send less often, or raise --queue"
            raise Rejected("server", expected, got, remedy, Status.RESOURCE_EXHAUSTED)

    def _expire(self, ticket: _Ticket) -> None:
        self.expired += 1
        ticket.expired = True
        ticket.called.release()

    def _lead(self, ticket: _Ticket) -> None:
        batch = [ticket]
        if self._max_batch > 1:
            with self._lock:
                same = [t for t in self._line if t.policy is ticket.policy and not t.caller.gone]
                batch += same[: self._max_batch - 1]
                for taken in batch[1:]:
                    self._line.remove(taken)
        start = time.perf_counter()
        try:
            proposals = iter(ticket.policy.act_many([o for t in batch for o in t.observations]))
            spent = time.perf_counter() - start
            for one in batch:
                one.outcome = Turn([next(proposals) for _ in one.observations], start - one.came, spent)
        except BaseException as error:
            for one in batch:
                one.outcome = error
        finally:
            for follower in batch[1:]:
                follower.called.release()
            self._leave(ticket)

    def _leave(self, ticket: _Ticket) -> None:
        """Give the place to the first in line who may have it and still wants it; who had it goes behind others."""
        with self._lock:
            self._in_use -= 1
            self._running[ticket.caller.name] -= 1
            if not self._running[ticket.caller.name]:
                del self._running[ticket.caller.name]
            for candidate in sorted(self._line, key=lambda t: t.caller.name == ticket.caller.name):
                if self._in_use == self._concurrency:
                    break
                if candidate.caller.gone:
                    self._line.remove(candidate)
                    self._expire(candidate)
                elif self._may_start(candidate.caller.name):
                    self._line.remove(candidate)
                    self._start(candidate)


def _patience_s(caller: Caller) -> float:
    return max(0.0, min(caller.expires_at - time.monotonic(), threading.TIMEOUT_MAX))


def _too_late() -> Rejected:
    return Rejected(
        "deadline",
        "time left when the model was free",
        "none",
        "allow more time, or send less",
        Status.DEADLINE_EXCEEDED,
    )
