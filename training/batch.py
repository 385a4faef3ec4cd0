"""The one type that crosses from data to agent. Per-sample scalars are [B], never [B, 1]."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class State:
    """What a policy sees: depth in metres below the camera plane, and the gripper's state."""

    depth: Float[Tensor, "B 1 H W"]
    gripper: Float[Tensor, "B 1"]


@dataclass(frozen=True)
class Batch:
    """Transitions. Actions are normalised: scalars in [-1, 1], vectors in the unit disc."""

    state: State
    action: Float[Tensor, "B A"]
    reward: Float[Tensor, " B"]
    """Discounted sum of the rewards on the way to `next_state`."""
    discount: Float[Tensor, " B"]
    """What the value of `next_state` counts for: gamma to the number of steps, and 0 where the episode terminated; a
    truncated episode continues."""
    next_state: State

    def copy_(self, other: "Batch") -> None:
        """Take the numbers of a batch of the same shapes."""
        for own, its in zip(self.tensors, other.tensors, strict=True):
            own.copy_(its)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        s, s2 = self.state, self.next_state
        return s.depth, s.gripper, self.action, self.reward, self.discount, s2.depth, s2.gripper
