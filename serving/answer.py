"""What a call comes to: an answer, or an error."""

from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from protos.equiserve.v1 import policy_pb2 as pb

MOMENTARY = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,  # it met the server's end on its way
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""What says nothing of the request, but of the server at that moment."""


class PolicyError(Exception):
    """A call that failed.

    Attributes:
        code: the gRPC status, e.g. grpc.StatusCode.INVALID_ARGUMENT.
        message: what the server said: the field, what it expected, what came.
        busy: the server had no room for this call, at this moment.
        late: the frame was too old, the step is behind one that was answered, or no answer came before it had expired.
        answered: the server itself said so; else the call did not get there, or nothing came back.
    """

    def __init__(self, code: grpc.StatusCode, message: str, *, answered: bool = True) -> None:
        self.code, self.message, self.answered = code, message, answered
        self.busy = code is grpc.StatusCode.RESOURCE_EXHAUSTED
        self.late = code is grpc.StatusCode.OUT_OF_RANGE
        super().__init__(f"{code.name}: {message}")


@dataclass(frozen=True)
class Answer:
    """One answer. Actions and std are float32 [A], in the order of the contract's components, in physical units."""

    action: NDArray[np.float32]
    """To apply before `expires_at`."""
    raw_action: NDArray[np.float32]
    """What the policy said before the server's limits. Not to be applied."""
    std: NDArray[np.float32]
    value: float | None
    interventions: tuple[pb.Intervention, ...]
    """Every difference between raw_action and action, with its reason."""
    hold: bool
    """The policy had no valid answer; `action` is to stay."""
    warnings: tuple[str, ...]
    """What is suspicious about the observation."""
    latency_ms: float
    """From this call's start to its end, retries included."""
    timing: pb.Timing
    """Where the server spent its part."""
    policy: str
    version: str
    valid_for_us: int
    expires_at: float
    """time.monotonic() after which `action` must not be applied: counted from the first try's sending."""
    request_id: str
    """Also in the server's log and recording."""
