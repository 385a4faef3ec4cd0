"""A call before the model: who asks, the place it takes, and what the policy said."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos.spaces import Observation
from serving.policy import Policy, Proposal


def seconds_until(moment: float) -> float:
    """From now on (time.monotonic), and as many as a lock can be told to wait."""
    return max(0.0, min(moment - time.monotonic(), threading.TIMEOUT_MAX))


@dataclass(frozen=True)
class Caller:
    """Whose call it is, until when an answer is of use (time.monotonic seconds), and whether it still wants one."""

    name: str
    expires_at: float
    alive: Callable[[], bool]
    replied: threading.Event | None = None
    """Set when the reply has gone out; None where this turn is not the call's last."""

    @property
    def gone(self) -> bool:
        return time.monotonic() >= self.expires_at or not self.alive()

    @property
    def patience_s(self) -> float:
        """How long to wait for an answer."""
        return seconds_until(self.expires_at)


@dataclass(frozen=True)
class Turn:
    """What the policy said of each observation, and where the time went."""

    proposals: Sequence[Proposal]
    queue_s: float
    inference_s: float


@dataclass(eq=False)
class Ticket:
    """A call on its way through the dispatcher."""

    caller: Caller
    policy: Policy
    observations: Sequence[Observation]
    leads: bool = False
    """Holds one of the places before the model, and runs it."""
    outcome: Turn | BaseException | None = None
    came: float = field(default_factory=time.perf_counter)
    called: threading.Lock = field(default_factory=threading.Lock)

    @property
    def size(self) -> int:
        return len(self.observations)

    def failure(self) -> BaseException:
        """To be raised, and kept here no longer: its traceback leads to the ticket, and would so lead to itself."""
        failure, self.outcome = self.outcome, None
        assert isinstance(failure, BaseException)
        return failure

    def __post_init__(self) -> None:
        self.called.acquire()  # released when there is news: a place, an answer, or that it is too late
