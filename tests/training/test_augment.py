"""Augmentation turns a batch as protos.symmetry turns its parts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from protos.spaces import ACTION, ObservationSpec, PolicySpec
from protos.symmetry import Element
from tests.makers import CONVENTIONS
from tests.training.conftest import SMALL
from training.batch import Batch, State
from training.data.augment import randomly, transform


def batch_of(spec: PolicySpec, size: int = 5) -> Batch:
    smooth = torch.nn.functional.interpolate(
        torch.rand(2 * size, 1, 6, 6), size=spec.observation.height, mode="bicubic"
    )
    gripper = torch.rand(2 * size, 1).round()
    return Batch(
        state=State(smooth[:size], gripper[:size]),
        action=torch.rand(size, ACTION.size) - 0.5,
        reward=torch.rand(size),
        discount=torch.full((size,), 0.99),
        next_state=State(smooth[size:], gripper[size:]),
    )


@pytest.mark.parametrize(("row_axis", "col_axis"), CONVENTIONS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270, 45, 200])
def test_images_and_actions_turn_as_the_contract_says(
    degrees: int, flip: bool, row_axis: tuple[int, int], col_axis: tuple[int, int]
) -> None:
    spec = PolicySpec(ObservationSpec(height=32, width=32, row_axis=row_axis, col_axis=col_axis), ACTION)
    batch, turn = batch_of(spec), Element(math.radians(degrees), flip)
    after = transform(batch, torch.full((5,), turn.angle), torch.full((5,), flip), spec)
    np.testing.assert_allclose(after.action, turn.action(batch.action.numpy(), ACTION), atol=1e-6)
    for before, now in ((batch.state, after.state), (batch.next_state, after.next_state)):
        np.testing.assert_allclose(now.depth, turn.image(before.depth.numpy(), spec.observation), atol=2e-3)
        np.testing.assert_array_equal(now.gripper, before.gripper)
    np.testing.assert_array_equal(after.reward, batch.reward)


@pytest.mark.parametrize(("row_axis", "col_axis"), CONVENTIONS)
@pytest.mark.parametrize("flip", [False, True])
def test_a_scene_is_moved_as_the_world_is(flip: bool, row_axis: tuple[int, int], col_axis: tuple[int, int]) -> None:
    """A block, turned by a quarter and then moved, is where the same block is found in the moved world."""
    spec = PolicySpec(ObservationSpec(height=32, width=32, row_axis=row_axis, col_axis=col_axis), ACTION)
    pixel_m = spec.observation.extent_m / 32
    block, shift, turn = np.array([5.5, 2.5]) * pixel_m, np.array([-3.0, 4.0]) * pixel_m, Element(math.pi / 2, flip)

    def seen(offset_m: np.ndarray) -> torch.Tensor:
        row, col = spec.observation.pixel_of(offset_m).round().astype(int)
        image = torch.full((32, 32), 0.3)
        image[row, col] = 0.1
        return image

    batch = batch_of(spec, size=1)
    batch = replace(batch, state=replace(batch.state, depth=seen(block)[None, None]))
    moved = torch.tensor(shift[None], dtype=torch.float32)
    after = transform(batch, torch.full((1,), turn.angle), torch.full((1,), flip), spec, moved)
    np.testing.assert_allclose(after.state.depth[0, 0], seen(turn.planar @ block + shift), atol=1e-4)
    np.testing.assert_allclose(after.action, turn.action(batch.action.numpy(), ACTION), atol=1e-6)


def test_se2_moves_every_sample_within_its_bound_and_both_images_alike() -> None:
    batch = batch_of(SMALL, size=64)
    batch = replace(batch, next_state=batch.state)
    still = randomly(batch, SMALL, torch.Generator().manual_seed(0))
    moved = randomly(batch, SMALL, torch.Generator().manual_seed(0), shift_m=0.02)
    torch.testing.assert_close(moved.action, still.action)
    torch.testing.assert_close(moved.state.depth, moved.next_state.depth)
    assert all(not torch.allclose(a, b) for a, b in zip(moved.state.depth, still.state.depth, strict=True))


def test_every_sample_gets_an_angle_of_its_own() -> None:
    batch = batch_of(SMALL)
    same = Batch(batch.state, batch.action[:1].expand(5, -1), batch.reward, batch.discount, batch.next_state)
    after = randomly(same, SMALL, torch.Generator().manual_seed(0))
    planar = after.action[:, ACTION.slice_of("planar")]
    assert len(torch.unique(planar.round(decimals=4), dim=0)) == 5
    yaw = ACTION.slice_of("yaw")
    torch.testing.assert_close(after.action[:, yaw], same.action[:, yaw])
    torch.testing.assert_close(planar.norm(dim=1), same.action[:, ACTION.slice_of("planar")].norm(dim=1))


def test_angles_and_shifts_are_drawn_from_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly: over the circle, and over the disc of the given radius."""
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr("training.data.augment.transform", lambda batch, *all_: drawn.extend((all_[0], all_[3])))
    randomly(batch_of(SMALL, size=4000), SMALL, torch.Generator().manual_seed(0), shift_m=0.02)
    angle, shift = drawn
    where = torch.atan2(shift[:, 1], shift[:, 0]) % (2 * math.pi)
    for turn in (angle, where):
        assert torch.histc(turn, 8, 0, 2 * math.pi).min() > 400  # of 500
    radius = shift.norm(dim=1)
    assert radius.max() <= 0.02 + 1e-6
    assert 0.45 < (radius > 0.02 / math.sqrt(2)).float().mean() < 0.55  # half of the disc lies there


def test_o2_mirrors_about_half_of_the_batch() -> None:
    batch = batch_of(SMALL, size=200)
    after = randomly(batch, SMALL, torch.Generator().manual_seed(0), reflections=True)
    yaw = ACTION.slice_of("yaw")
    mirrored = (after.action[:, yaw] == -batch.action[:, yaw]).float().mean()
    assert 0.4 < mirrored < 0.6
