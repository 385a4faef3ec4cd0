"""Who gets the model next: a short line, shared fairly between clients, before a fixed number of inferences.

It has no thread of its own: the thread that answers a call runs its inference when its turn has come, and hands its
place to the next in line. With `max_batch` > 1 it also takes along who waits for the same policy; nobody ever waits
for a batch to fill, so a lone client pays nothing for it.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence

from protos.errors import Rejected, Status
from protos.spaces import Observation
from serving.libc import offer_core, offer_interpreter
from serving.policy import Policy
from serving.rhythm import Rhythm
from serving.turn import Caller, Ticket, Turn

SHORT = 0.5
"""In an overload, only who has no more than this share of an inference before him may wait."""
REPLY_S = 0.002
"""How long a flood's inference waits, at most, until the answer that a controller has just been given is out."""


class Dispatcher:
    """Runs at most `concurrency` inferences at once and lets at most `queue` calls wait, for about `max_wait_s`.

    Beside others no client can take all of several places; of a line of several, none ever can. And who asks for more
    than a fair share of the model's time starts nothing that another's next call would wait for: who floods, floods
    himself.
    """

    def __init__(
        self,
        concurrency: int,
        queue: int,
        max_batch: int = 1,
        *,
        max_wait_s: float = math.inf,
        client_hz: float = math.inf,
    ) -> None:
        self._concurrency, self._longest, self._max_batch, self._max_wait_s = concurrency, queue, max_batch, max_wait_s
        self._lock = threading.Lock()
        self._line: deque[Ticket] = deque()
        self._running: dict[str, int] = {}
        self._rhythm = Rhythm(concurrency, client_hz)
        self._turns: dict[Ticket, float] = {}
        """Who has a place before the model, and since when (time.monotonic)."""
        self._answered: list[tuple[str, threading.Event | None]] = []
        """Who was in the last turn, and what says that the reply is out. Not the callers themselves: the last call, its
        message and all, would be kept for the next one to free."""
        self.expired = 0
        """Calls that left the line without an answer: the model was never asked for them."""

    @property
    def running(self) -> int:
        return len(self._turns)

    @property
    def waiting(self) -> int:
        return len(self._line)

    def act(self, policy: Policy, observations: Sequence[Observation], caller: Caller) -> Turn:
        """The policy's proposals, in turn. A turn is not interrupted: many observations are better asked for in parts.

        Raises:
            Rejected: RESOURCE_EXHAUSTED at once when the line is full; DEADLINE_EXCEEDED when the caller's time ran
                out, or he left, before his turn came.
        """
        ticket = Ticket(caller, policy, observations)
        with self._lock:
            if caller.gone:
                self.expired += 1
                raise _too_late()
            if self._require_room(caller.name, ticket.size):
                self._start(ticket)
            else:
                self._line.append(ticket)
        if not ticket.called.acquire(timeout=caller.patience_s):
            with self._lock:
                if ticket in self._line:
                    self._line.remove(ticket)
                    self._expire(ticket)
            ticket.called.acquire()  # its turn may have come in the last moment
        if ticket.leads:
            self._lead(ticket)
        if isinstance(ticket.outcome, Turn):
            return ticket.outcome
        raise ticket.failure()

    def admit(self, name: str, *, repeats: bool = False) -> None:
        """A call of `name` has come: refuse it before any work is done, if `act` would now.

        Args:
            repeats: it may have been answered already, and then the model need not be asked: `act` will see.

        Raises:
            Rejected: RESOURCE_EXHAUSTED.
        """
        with self._lock:
            now = time.monotonic()
            self._rhythm.asks(name, now)
            if not repeats:
                rarer_acts = any(self._rhythm.is_rarer(turn.caller.name, name, now) for turn in self._turns)
                if rarer_acts and self._rhythm.yields(name, now):
                    self._rhythm.holds_back(name)
                    raise _too_much()  # its message would be read at the cost of a controller's inference
                self._require_room(name)

    def admit_question(self, name: str) -> None:
        """A call of `name` has come that needs no model. Raises Rejected, RESOURCE_EXHAUSTED: see
        Rhythm.admits_question."""
        with self._lock:
            if not self._rhythm.admits_question(name, time.monotonic()):
                expected = f"at most {self._rhythm.client_hz:g} such calls a second while others act"
                raise Rejected("server", expected, "more", "ask less often", Status.RESOURCE_EXHAUSTED)

    def asks_more(self, name: str, inferences: int) -> None:
        """The call of `name` that was admitted wants so many besides the first."""
        with self._lock:
            self._rhythm.asks_more(name, time.monotonic(), inferences)

    def part(self, name: str, most: int) -> int:
        """How many observations, up to `most`, a client had better ask for in one turn: see Rhythm.part."""
        with self._lock:
            return self._rhythm.part(name, most, time.monotonic())

    def _require_room(self, name: str, size: int = 1) -> bool:
        """True where a call for `size` inferences may start, False where it may wait."""
        self._require_share(name, size)
        if self._may_start(name):
            return True
        for gone in [t for t in self._line if t.caller.gone]:
            self._line.remove(gone)
            self._expire(gone)
        self._require_a_short_wait(name)
        own, room = sum(t.caller.name == name for t in self._line), self._room
        share = room - 1 if self._rhythm.yields(name, time.monotonic()) else max(1, room - 1)
        if len(self._line) >= room or own >= share:
            full = len(self._line) >= room
            self._rhythm.refuses(name, time.monotonic())
            expected = f"at most {room if full else share} waiting calls{'' if full else ' of one client'}"
            got = f"{(len(self._line) if full else own) + 1}"
            remedy = "send less often, or raise --queue or --max-wait-ms"
            raise Rejected("server", expected, got, remedy, Status.RESOURCE_EXHAUSTED)
        return False

    def _require_a_short_wait(self, name: str) -> None:
        """Where all together ask for too much, somebody else comes in a moment and has to wait less. Unless their beats
        keep it so, and it is always this one who has to go.
        """
        now = time.monotonic()
        if self._rhythm.asked_too_much(now) and not self._rhythm.starves(name):
            left_s = self._rhythm.turn_s - (now - min(self._turns.values(), default=-math.inf))
            if left_s > SHORT * self._rhythm.turn_s:
                self._rhythm.refuses(name, now)
                expected, got = "a call that the model is nearly free for", "one of too many, while it is busy"
                raise Rejected("server", expected, got, "send less often", Status.RESOURCE_EXHAUSTED)

    @property
    def _room(self) -> int:
        """How many may wait: always one, and more where the last of them gets its turn in time.

        Where all together ask for more than there is, somebody is refused anyway: then only those may wait who are
        next, or everybody would wait as long as the line allows.
        """
        if not self._rhythm.turn_s:
            return self._longest
        at_once = self._concurrency * self._max_batch
        if self._rhythm.asked_too_much(time.monotonic()):
            return min(self._longest, at_once)
        turns = self._max_wait_s / self._rhythm.turn_s * at_once
        return min(self._longest, max(1, int(min(turns, self._longest))))

    def _require_share(self, name: str, size: int = 1) -> None:
        if self._rhythm.is_in_the_way(name, time.monotonic(), size):
            self._rhythm.holds_back(name)
            raise _too_much()

    def _may_start(self, name: str) -> bool:
        share = self._concurrency
        if share > 1 and not self._rhythm.is_alone(name, time.monotonic()):
            share -= 1
        return len(self._turns) < self._concurrency and self._running.get(name, 0) < share

    def _start(self, ticket: Ticket) -> None:
        ticket.leads = True
        now = self._turns[ticket] = time.monotonic()
        self._running[ticket.caller.name] = self._running.get(ticket.caller.name, 0) + 1
        self._rhythm.starts(ticket.caller.name, now, ticket.size)
        ticket.called.release()

    def _expire(self, ticket: Ticket) -> None:
        self.expired += 1
        self._refuse(ticket, _too_late())

    def _refuse(self, ticket: Ticket, why: Rejected) -> None:
        ticket.outcome = why
        ticket.called.release()

    def _lead(self, ticket: Ticket) -> None:
        batch = [ticket]
        try:
            if self._max_batch > 1:
                self._take_along(batch)
            self._let_replies_go(ticket.caller.name)
            # Who has just come, or is to be refused, would else wait for a whole inference, first for the core and then
            # for the interpreter: at twice the capacity it makes accepted calls' p99 9 ms instead of 25.
            offer_core()
            start = time.perf_counter()
            proposals = iter(ticket.policy.act_many([o for t in batch for o in t.observations]))
            spent = time.perf_counter() - start
            offer_interpreter()
            with self._lock:
                self._rhythm.took(spent / sum(one.size for one in batch))
                self._answered = [(one.caller.name, one.caller.replied) for one in batch]
            for one in batch:
                one.outcome = Turn([next(proposals) for _ in one.observations], start - one.came, spent)
        except BaseException as error:
            for one in batch:
                one.outcome = error
        finally:
            for follower in batch[1:]:
                follower.called.release()
            self._leave(ticket)

    def _take_along(self, batch: list[Ticket]) -> None:
        """Those in the line that want the same policy, as many as fit."""
        with self._lock:
            for other in [t for t in self._line if t.policy is batch[0].policy and not t.caller.gone]:
                if sum(t.size for t in batch) + other.size <= self._max_batch:
                    self._line.remove(other)
                    batch.append(other)
                    self._rhythm.starts(other.caller.name, time.monotonic(), other.size)

    def _let_replies_go(self, name: str) -> None:
        """Before an inference of `name` takes the core from them: those of the last, to clients that ask much less."""
        with self._lock:
            now = time.monotonic()
            going = [replied for other, replied in self._answered if self._rhythm.is_rarer(other, name, now)]
        until = time.monotonic() + REPLY_S
        for replied in going:
            if replied:
                replied.wait(until - time.monotonic())

    def _leave(self, ticket: Ticket) -> None:
        """Give the place to the first in line who may have it and still wants it; who had it goes behind others."""
        with self._lock:
            del self._turns[ticket]
            self._running[ticket.caller.name] -= 1
            if not self._running[ticket.caller.name]:
                del self._running[ticket.caller.name]
            for candidate in sorted(self._line, key=lambda t: t.caller.name == ticket.caller.name):
                if len(self._turns) == self._concurrency:
                    break
                if candidate.caller.gone:
                    self._line.remove(candidate)
                    self._expire(candidate)
                elif self._may_start(candidate.caller.name):
                    self._line.remove(candidate)
                    try:
                        self._require_share(candidate.caller.name, candidate.size)
                        self._start(candidate)
                    except Rejected as why:
                        self._refuse(candidate, why)


def _too_much() -> Rejected:
    expected, got = "a controller's rate, and a fair share of the model's time", "more, while others act"
    return Rejected("server", expected, got, "send less often", Status.RESOURCE_EXHAUSTED)


def _too_late() -> Rejected:
    return Rejected(
        "deadline",
        "time left when the model was free",
        "none",
        "allow more time, or send less",
        Status.DEADLINE_EXCEEDED,
    )
