"""SO(2), O(2) and SE(2) augmentation of whole batches on their device: an episode counts for all its rotations."""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from protos.spaces import Kind, ObservationSpec, PolicySpec
from training.batch import Batch, State


def transform(
    batch: Batch,
    angle: Float[Tensor, " B"],
    flip: Bool[Tensor, " B"],
    spec: PolicySpec,
    shift_m: Float[Tensor, "B 2"] | None = None,
) -> Batch:
    """Apply to every transition its own `protos.symmetry.Element(angle, flip)`: both images and the action.

    Then move the scene under the view by `shift_m`, metres in world x and y, in both images alike. The view is centred
    on the gripper, so this is no symmetry but a camera that is mounted a little off: the action stays.

    What comes in from outside a view takes the nearest edge pixel; but for a shift, it lies outside the disc that
    networks look at.
    """
    cos, sin, mirror = torch.cos(angle), torch.sin(angle), 1.0 - 2.0 * flip.to(angle.dtype)
    planar = _matrices([[cos, -sin * mirror], [sin, cos * mirror]])
    action = batch.action.clone()
    for field in spec.action.fields:
        place = spec.action.slice_of(field.name)
        if field.kind is Kind.VECTOR:
            action[:, place] = torch.einsum("bij,bj->bi", planar, batch.action[:, place])
        elif field.kind is Kind.PSEUDOSCALAR:
            action[:, place] *= mirror[:, None]
    depth = torch.cat([batch.state.depth, batch.next_state.depth], dim=1)
    shift_m = torch.zeros(len(angle), 2).to(angle) if shift_m is None else shift_m
    grid = _grid(cos, sin, mirror, shift_m, spec.observation, depth.shape)
    moved = F.grid_sample(depth, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return replace(
        batch,
        state=State(moved[:, :1], batch.state.gripper),
        action=action,
        next_state=State(moved[:, 1:], batch.next_state.gripper),
    )


def randomly(
    batch: Batch, spec: PolicySpec, generator: torch.Generator, *, reflections: bool = False, shift_m: float = 0.0
) -> Batch:
    """`transform` by angles uniform over the circle; with `reflections` mirrored half of the time; moved anywhere
    within `shift_m`."""
    size, device = len(batch.action), generator.device
    angle = 2 * math.pi * torch.rand(size, generator=generator, device=device)
    flip = torch.rand(size, generator=generator, device=device) < (0.5 if reflections else 0.0)
    radius = shift_m * torch.rand(size, generator=generator, device=device).sqrt()
    where = 2 * math.pi * torch.rand(size, generator=generator, device=device)
    shift = torch.stack([radius * torch.cos(where), radius * torch.sin(where)], dim=-1)
    to = batch.action.device
    return transform(batch, angle.to(to), flip.to(to), spec, shift.to(to))


def _grid(
    cos: Tensor, sin: Tensor, mirror: Tensor, shift_m: Tensor, spec: ObservationSpec, shape: torch.Size
) -> Float[Tensor, "B H W 2"]:
    """Where each pixel of the moved image looks up: the shift undone, the turn, then the reflection. x is right and y
    is down, each from -1 to 1 across the view."""
    sin = sin * spec.handedness
    right, down = (shift_m @ shift_m.new_tensor([spec.col_axis, spec.row_axis]).T / (spec.extent_m / 2)).unbind(dim=1)
    rows = [[cos, -sin, sin * down - cos * right], [sin, cos, -sin * right - cos * down]]
    along = 0 if spec.col_axis[1] else 1  # the image axis on which world y lies
    rows[along] = [mirror * entry for entry in rows[along]]
    return F.affine_grid(_matrices(rows), list(shape), align_corners=False)


def _matrices(rows: list[list[Tensor]]) -> Tensor:
    """[B] entries -> [B, rows, columns]."""
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
