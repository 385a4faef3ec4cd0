"""Episodes: a pinned policy, steps that are answered once and in order, and the action that came before."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from protos.codec import unpack_action
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status, shown
from serving.envelope import Envelope
from serving.past import Before, Past
from serving.policy import Policy

Answer = Callable[[Before], pb.GetActionResponse]
"""What is asked for a new step."""

SPARED_S = 30.0
"""An episode that had a call within this time is never forgotten to make room for another."""
WAITING = 2
"""Calls of one episode that may wait for the one before, each with a thread of the server's: doubles of it, say."""


@dataclass(eq=False)
class Episode:
    """One run of a robot. `mode` and `seed` are those of StartEpisode; a mode left out there is greedy here."""

    id: str
    policy: Policy
    envelope: Envelope
    mode: pb.Mode
    seed: int
    touched: float = field(default_factory=time.monotonic)
    steps: int = 0
    _ended: bool = False
    _last: tuple[pb.GetActionRequest, pb.GetActionResponse] | None = None
    _past: Past = field(default_factory=Past)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _places: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1 + WAITING))

    def require_pinned(self, request: pb.GetActionRequest) -> None:
        """What StartEpisode settled may be repeated, not changed. Raises Rejected, FAILED_PRECONDITION."""
        settled = {
            "policy": (request.policy, self.policy.name),
            "version": (request.version, self.policy.version),
            "mode": (request.mode and pb.Mode.Name(request.mode), pb.Mode.Name(self.mode)),
            "seed": (request.seed, self.seed),
        }
        for name, (asked, pinned) in settled.items():
            if asked and asked != pinned:
                remedy = "StartEpisode settled it; leave it out"
                raise Rejected(name, str(pinned), "another", remedy, Status.FAILED_PRECONDITION)
        self.policy.require_contract(request.contract_digest)

    def step(self, request: pb.GetActionRequest, patience_s: float, answer: Answer) -> pb.GetActionResponse:
        """Answer each step once: the same step again gets the same message, whoever asks meanwhile waits.

        A step that failed was not taken: it may be tried again.

        Raises:
            Rejected: OUT_OF_RANGE for an older step, FAILED_PRECONDITION for another observation under the same step,
                DEADLINE_EXCEEDED when an earlier call of this episode takes longer than `patience_s`,
                RESOURCE_EXHAUSTED when WAITING calls wait for it already.
        """
        with self._alone("step", patience_s):
            self.touched = time.monotonic()
            if self._last is not None:
                asked, answered = self._last
                if request.step < asked.step:
                    remedy = "its answer may have been superseded; do not act on it"
                    expected = f"a step after {asked.step}"
                    raise Rejected("step", expected, str(request.step), remedy, Status.OUT_OF_RANGE)
                if request.step == asked.step:
                    _require_same(request, asked)
                    return answered
            self._past.require_possible(request)
            response = answer(self._past.before(request))
            self._past.answered(request, unpack_action(response.action, self.policy.spec.action))
            self._last = request, response
            self.steps += 1
            return response

    def end(self, patience_s: float) -> int:
        """Take no more steps; returns how many there were, the one under way included.

        Raises:
            Rejected: DEADLINE_EXCEEDED when that takes longer than `patience_s`, RESOURCE_EXHAUSTED when WAITING calls
                wait already, and nothing has ended; NOT_FOUND where it has ended before.
        """
        with self._alone("episode_id", patience_s):
            self._ended = True
            return self.steps

    @contextmanager
    def _alone(self, field: str, patience_s: float) -> Iterator[None]:
        remedy = "one call at a time in an episode"
        if not self._places.acquire(blocking=False):
            expected = f"at most {WAITING} calls that wait for the one before"
            raise Rejected(field, expected, "one more", remedy, Status.RESOURCE_EXHAUSTED)
        try:
            if not self._turn.acquire(timeout=patience_s):
                raise Rejected(field, "the call before to be over", "none", remedy, Status.DEADLINE_EXCEEDED)
            try:
                if self._ended:  # while this call waited
                    raise _unknown(self.id, "it ended")
                yield
            finally:
                self._turn.release()
        finally:
            self._places.release()


class Sessions:
    """The open episodes: at most `limit`, each forgotten after `idle_s` without a call, or sooner to make room."""

    def __init__(self, limit: int, idle_s: float) -> None:
        self._limit, self._idle_s = limit, idle_s
        self._open: dict[str, Episode] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            self._forget_idle()
            return len(self._open)

    def start(self, policy: Policy, envelope: Envelope, mode: pb.Mode, seed: int) -> Episode:
        """Raises Rejected, RESOURCE_EXHAUSTED, when too many are open, and each had a call within SPARED_S."""
        episode = Episode(uuid.uuid4().hex, policy, envelope, mode, seed)
        with self._lock:
            self._forget_idle()
            if len(self._open) >= self._limit and not self._make_room():
                remedy = f"end episodes with EndEpisode; one that is idle for {SPARED_S:g} s makes room"
                got = f"{len(self._open)} open"
                expected = f"fewer than {self._limit} episodes"
                raise Rejected("server", expected, got, remedy, Status.RESOURCE_EXHAUSTED)
            self._open[episode.id] = episode
        return episode

    def get(self, episode_id: str) -> Episode:
        """Raises Rejected, NOT_FOUND."""
        with self._lock:
            return self._require(episode_id)

    def end(self, episode_id: str, patience_s: float) -> int:
        """Forget it; returns how many steps it took. Raises Rejected, NOT_FOUND, and what Episode.end raises."""
        steps = self.get(episode_id).end(patience_s)
        with self._lock:
            self._open.pop(episode_id, None)
        return steps

    def _require(self, episode_id: str) -> Episode:
        episode = self._open.get(episode_id)
        if episode is not None and time.monotonic() - episode.touched < self._idle_s:
            return episode
        why = f"it ended, was idle for {self._idle_s:g} s, made room for another, or the server was started again"
        raise _unknown(episode_id, why)

    def _make_room(self) -> bool:
        """A controller that starts an episode, dies and begins again must not lock out all others, itself included:
        who has had no call for longest goes."""
        longest = min(self._open.values(), key=lambda e: e.touched)
        idle = time.monotonic() - longest.touched >= SPARED_S
        if idle:
            del self._open[longest.id]
        return idle

    def _forget_idle(self) -> None:
        now = time.monotonic()
        self._open = {i: e for i, e in self._open.items() if now - e.touched < self._idle_s}


def _unknown(episode_id: str, why: str) -> Rejected:
    return Rejected(
        "episode_id", "an open episode", shown(episode_id), f"{why}: call StartEpisode", Status.NOT_FOUND
    )  # fmt: skip


def _require_same(request: pb.GetActionRequest, before: pb.GetActionRequest) -> None:
    """A retry may be older than the first try; all else that it shows, and says of the arm, must be the same."""
    told, first = ((r.at_rest, r.applied_step if r.HasField("applied_step") else None) for r in (request, before))
    for name, ours, theirs in zip(("at_rest", "applied_step"), told, first, strict=True):
        if ours != theirs:
            remedy = "what happened meanwhile is for a new step"
            raise Rejected(name, "the same as the first time", "another", remedy, Status.FAILED_PRECONDITION)
    now, then = ({f.name: value for f, value in r.observation.ListFields()} for r in (request, before))
    different = sorted(name for name in (now.keys() | then.keys()) - {"age_us"} if now.get(name) != then.get(name))
    if different:
        raise Rejected(
            "step", "the same observation as the first time", f"another {', '.join(different)}",
            "a new frame needs a new step", Status.FAILED_PRECONDITION,
        )  # fmt: skip
