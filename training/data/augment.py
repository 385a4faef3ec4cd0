"""SO(2) augmentation of whole batches on their device: every recorded transition counts for all its rotations."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from protos.spaces import Kind, PolicySpec
from training.batch import Batch, State


def rotate(batch: Batch, angle: Float[Tensor, " B"], spec: PolicySpec) -> Batch:
    """Turn every transition about +z by its own angle: both images, and every vector of the action.

    What turns in from outside a view takes the nearest edge pixel; it lies outside the disc that networks look at.
    """
    cos, sin = torch.cos(angle), torch.sin(angle)
    planar = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # [B, 2, 2]
    action = batch.action.clone()
    for field in spec.action.fields:
        if field.kind is Kind.VECTOR:
            place = spec.action.slice_of(field.name)
            action[:, place] = torch.einsum("bij,bj->bi", planar, batch.action[:, place])
    grid = _grid(cos, sin * spec.observation.handedness, batch.state.depth.shape)
    turned = F.grid_sample(
        torch.cat([batch.state.depth, batch.next_state.depth], dim=1),
        grid,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    now, then = turned[:, :1], turned[:, 1:]
    return replace(
        batch,
        state=State(now, batch.state.gripper),
        action=action,
        next_state=State(then, batch.next_state.gripper),
    )


def random_rotation(batch: Batch, spec: PolicySpec, generator: torch.Generator) -> Batch:
    """`rotate` by angles uniform over the full circle."""
    angle = 2 * math.pi * torch.rand(len(batch.action), generator=generator, device=generator.device)
    return rotate(batch, angle.to(batch.action.device), spec)


def _grid(cos: Tensor, sin: Tensor, shape: torch.Size) -> Float[Tensor, "B H W 2"]:
    """Where each pixel of an image turned counter-clockwise, as displayed, looks up; x is right and y is down."""
    zero = torch.zeros_like(cos)
    inverse = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], -2)
    return F.affine_grid(inverse, list(shape), align_corners=False)
