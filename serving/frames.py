"""What is suspicious about a frame, though it is valid: a camera that repeats itself, or that sees little."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos.errors import Rejected, Status
from protos.spaces import Observation

REMEMBERED, REMEMBERED_BYTES = 512, 64 * 2**20
"""Sources whose last frame is kept, and how much of frames; the source that was silent longest is forgotten. A frame of
an episode is its client's, too, and counts twice, though it is one."""
SAMPLED = 997
"""Frames that differ mostly do so in some of every so many pixels; to compare all is to load them from memory."""
QUIET_S = 60.0
"""And whoever was silent for so long: clients that come and go would otherwise leave all those frames."""


@dataclass(frozen=True)
class FrameRules:
    """When a frame is suspicious, and whether that is a warning or a refusal."""

    frozen_after: int = 10
    """As many equal frames in a row; 0: never."""
    invalid_share: float = 0.2
    """More than this share of pixels without a measurement, that is of depth 0."""
    strict: bool = False


class Look(NamedTuple):
    """At one frame: how often it came in a row, this time included, and what to warn of."""

    sources: tuple[str, ...]
    depth: NDArray[np.float32]
    sample: bytes
    times: int
    warnings: list[str]


class FrameWatch:
    """Remembers the last frame of each source."""

    def __init__(self, rules: FrameRules) -> None:
        self._rules = rules
        self._lock = threading.Lock()
        self._last: OrderedDict[str, tuple[Look, float]] = OrderedDict()
        """And when it was answered."""
        self._bytes = 0

    def look(self, sources: tuple[str, ...], observation: Observation) -> Look:
        """What to warn of; the frame is remembered once it is `answered`.

        Args:
            sources: the episode, if there is one, and the client: an episode's first frame goes on from the client's
                last, or a camera would freeze unseen where episodes are short.

        Raises:
            Rejected: FAILED_PRECONDITION instead, where the rules are strict.
        """
        rules, warnings = self._rules, list[tuple[str, str]]()
        depth = observation.depth
        before = next((known[0] for source in sources if (known := self._last.get(source))), None)
        sample = depth.ravel()[::SAMPLED].tobytes()
        repeats = before is not None and before.sample == sample and np.array_equal(before.depth, depth)
        times = before.times + 1 if before is not None and repeats else 1
        if 0 < rules.frozen_after <= times:
            warnings.append(("a camera that moves on", f"the same frame {times} times running"))
        invalid = 0.0 if depth.min() > 0 else 1 - np.count_nonzero(depth) / depth.size
        if invalid > rules.invalid_share:
            warnings.append((f"at most {rules.invalid_share:.0%} of pixels without depth", f"{invalid:.0%}"))
        texts = [f"observation.depth: expected {expected}, got {got}" for expected, got in warnings]
        look = Look(sources, depth, sample, times, texts)
        if warnings and rules.strict:
            if times >= rules.frozen_after > 0:  # remembered, so that a minute later it is still frozen
                self.answered(look)
            raise Rejected("observation.depth", *warnings[0], "check the camera", Status.FAILED_PRECONDITION)
        return look

    def answered(self, look: Look) -> None:
        """Remember a frame. A caller who was refused for want of room sends it again, and no camera is to blame."""
        now = time.monotonic()
        with self._lock:
            for source in look.sources:
                if source in self._last:
                    self._forget(source)
                self._make_room(look.depth.nbytes, now)
                self._last[source] = look, now
                self._bytes += look.depth.nbytes

    def _make_room(self, size: int, now: float) -> None:
        while self._last:
            source, (_, since) = next(iter(self._last.items()))  # who was silent longest stands first
            room = len(self._last) < REMEMBERED and self._bytes + size <= REMEMBERED_BYTES
            if room and now - since < QUIET_S:
                break
            self._forget(source)

    def _forget(self, source: str) -> None:
        look, _ = self._last.pop(source)
        self._bytes -= look.depth.nbytes
