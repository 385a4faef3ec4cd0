"""The first stage of every network, inside the exported graph: metres and gripper state -> a round image."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from protos.spaces import ObservationSpec
from training.batch import State

HEIGHT_SCALE_M = 0.1
"""Heights are divided by this; the working height of a gripper."""
LOWEST = -3.0
"""Deeper than this many scales below the tool, depth carries nothing that the policy needs."""


def deepest_m(spec: ObservationSpec) -> float:
    """Depth from which on a network sees no difference."""
    return spec.plane_above_tool_m - LOWEST * HEIGHT_SCALE_M


class Stem(nn.Module):
    """State -> image [B, 2, S, S]: height relative to the tool, and the gripper's state tiled over the view.

    The corners of a square view turn in and out of sight, so everything outside the inscribed disc is set to zero:
    without them, a turned view holds the same pixels.
    """

    def __init__(self, spec: ObservationSpec, pool: int) -> None:
        super().__init__()
        self._tool_depth_m, self._pool = spec.plane_above_tool_m, pool
        side = spec.height // pool
        offsets = torch.arange(side) - (side - 1) / 2
        disc = torch.hypot(offsets[:, None], offsets[None, :]) <= side / 2
        self.register_buffer("disc", disc.float(), persistent=False)

    def forward(self, state: State) -> Float[Tensor, "B 2 S S"]:
        return self.image(state.depth, state.gripper)

    def image(self, depth: Float[Tensor, "B 1 H W"], gripper: Float[Tensor, "B 1"]) -> Float[Tensor, "B 2 S S"]:
        height = (self._tool_depth_m - F.avg_pool2d(depth, self._pool)) / HEIGHT_SCALE_M
        height = height.clamp(min=LOWEST) - LOWEST / 2  # centred near the usual range
        tiled = gripper[..., None, None] * torch.ones_like(height)
        return torch.cat([height, tiled], dim=1) * self.disc  # type: ignore[operator]
