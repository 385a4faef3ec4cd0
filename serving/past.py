"""What an arm has done of what an episode's steps were answered: the server and `serving.replay` must agree on it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected

FARTHEST = 64
"""Answers that are kept of an episode whose steps do not say what was applied."""


class Before(NamedTuple):
    """What came before a step.

    Attributes:
        action: [A], the last that was carried out; None: there was none, or which it was is not known.
        at_rest: whether the arm stands still.
    """

    action: NDArray[np.float32] | None
    at_rest: bool


class Past:
    """The answers of one episode, as far back as a step may deny them by its `applied_step`."""

    def __init__(self) -> None:
        self._answered: list[tuple[int, NDArray[np.float32]]] = []
        """(step, action) of the last ones that no step has denied, back to the one that a step said was applied."""

    def require_possible(self, request: pb.GetActionRequest) -> None:
        """Raise Rejected where `applied_step` claims what was never answered, or was denied before."""
        done = self._done(request)
        if done and request.HasField("applied_step") and done[-1][0] != request.applied_step:
            expected = f"{done[-1][0]}, or what was answered after it"
            remedy = "a step that another denied was not applied; ask when the action before is over"
            raise Rejected("applied_step", expected, str(request.applied_step), remedy)

    def before(self, request: pb.GetActionRequest) -> Before:
        """What came before the step that is asked for."""
        done = self._done(request)
        denied = len(done) < len(self._answered)
        return Before(done[-1][1] if done else None, request.at_rest or denied)

    def answered(self, request: pb.GetActionRequest, action: NDArray[np.float32]) -> None:
        """The request was answered with `action` [A]."""
        kept = 1 if request.HasField("applied_step") else FARTHEST - 1
        self._answered = [*self._done(request)[-kept:], (request.step, action)]

    def _done(self, request: pb.GetActionRequest) -> list[tuple[int, NDArray[np.float32]]]:
        if not request.HasField("applied_step"):
            return self._answered
        return [(step, action) for step, action in self._answered if step <= request.applied_step]
