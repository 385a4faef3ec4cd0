"""Depth in metres, and where in the image things are: every test here starts from PyBullet, not from our own `turn`."""

import math
from collections.abc import Iterator

import numpy as np
import pybullet as p
import pytest

from protos.spaces import OBSERVATION, ObservationSpec, side_view
from sim_client.arm import WORKSPACE_CENTRE
from sim_client.camera import camera, metres_of, orthographic
from sim_client.randomization import Misplacement
from tests.makers import CONVENTIONS

NO_ERROR = Misplacement()
PIXEL_M = OBSERVATION.extent_m / OBSERVATION.height


@pytest.fixture
def client() -> Iterator[int]:
    client = p.connect(p.DIRECT)
    yield client
    p.disconnect(client)


def add_box(client: int, x: float, y: float, height: float, half: float = 0.03) -> int:
    shape = p.createVisualShape(p.GEOM_BOX, halfExtents=(half, half, height / 2), physicsClientId=client)
    return p.createMultiBody(baseVisualShapeIndex=shape, basePosition=(x, y, height / 2), physicsClientId=client)


def add_table(client: int) -> None:
    shape = p.createVisualShape(p.GEOM_BOX, halfExtents=(1, 1, 0.01), physicsClientId=client)
    p.createMultiBody(baseVisualShapeIndex=shape, basePosition=(0, 0, -0.01), physicsClientId=client)


def seen(
    client: int, spec: ObservationSpec, tool: tuple[float, float, float], error: Misplacement = NO_ERROR
) -> np.ndarray:
    return camera(client, spec).look(tool, error).depth


@pytest.mark.parametrize("planes", [(0.1, 2.05), (0.1, 1.5), (0.05, 1.95), (0.4, 2.2)])
@pytest.mark.parametrize("height", [0.02, 0.1, 0.25])
def test_a_box_is_as_high_as_it_is_whatever_the_planes(client: int, planes: tuple[float, float], height: float) -> None:
    near, far = planes
    add_table(client)
    add_box(client, 0, 0, height)
    eye = 1.2
    view = p.computeViewMatrix((0, 0, eye), (0, 0, 0), (1, 0, 0))
    buffer = p.getCameraImage(64, 64, view, orthographic(0.2, near, far, 64), physicsClientId=client)[3]
    depth = metres_of(np.reshape(np.asarray(buffer, np.float32), (64, 64)), near, far)
    assert depth[0, 0] == pytest.approx(eye, abs=2e-4)
    assert depth[32, 32] == pytest.approx(eye - height, abs=2e-4)


def test_depth_is_measured_from_the_plane_above_the_tool(client: int) -> None:
    add_table(client)
    depth = seen(client, OBSERVATION, (0.1, -0.2, 0.17))
    assert depth.shape == OBSERVATION.shape
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, 0.17 + OBSERVATION.plane_above_tool_m, atol=1e-4)


@pytest.mark.parametrize(
    ("offset", "row_side", "col_side"),
    [((0.1, 0.0), -1, 0), ((-0.1, 0.0), 1, 0), ((0.0, 0.1), 0, -1), ((0.0, -0.1), 0, 1)],
    ids=["ahead is up", "behind is down", "the robot's left is left", "the robot's right is right"],
)
def test_orientation(client: int, offset: tuple[float, float], row_side: int, col_side: int) -> None:
    tool = (0.5, 0.1, 0.2)
    add_table(client)
    add_box(client, tool[0] + offset[0], tool[1] + offset[1], 0.05)
    depth = seen(client, OBSERVATION, tool)
    row, col = np.argwhere(depth < depth.max() - 0.02).mean(axis=0) - (OBSERVATION.height - 1) / 2
    assert (round(row * PIXEL_M, 2), round(col * PIXEL_M, 2)) == pytest.approx((row_side * 0.1, col_side * 0.1))


@pytest.mark.parametrize(("row_axis", "col_axis"), CONVENTIONS)
def test_the_image_obeys_the_spec_s_map_from_pixels_to_the_world(
    client: int, row_axis: tuple[int, int], col_axis: tuple[int, int]
) -> None:
    spec = ObservationSpec(row_axis=row_axis, col_axis=col_axis)
    add_table(client)
    errors = []
    for offset in np.random.default_rng(0).uniform(-0.15, 0.15, (20, 2)):
        box = add_box(client, *offset, height=0.05, half=0.02)
        depth = seen(client, spec, (0, 0, 0.2))
        p.removeBody(box, physicsClientId=client)
        errors.append(np.argwhere(depth < depth.max() - 0.02).mean(axis=0) - spec.pixel_of(offset))
    assert np.abs(errors).max() < 0.6
    assert np.abs(np.mean(errors, axis=0)).max() < 0.15, "no bias of half a pixel"


def test_where_nothing_is_drawn_the_camera_sees_the_table(client: int) -> None:
    add_box(client, 0.05, 0.02, height=0.06)
    undrawn = seen(client, OBSERVATION, (0, 0, 0.2))
    add_table(client)
    np.testing.assert_allclose(undrawn, seen(client, OBSERVATION, (0, 0, 0.2)), atol=2e-4)


@pytest.mark.parametrize("elevation", [15, 45, 90])
def test_a_side_view_is_aimed_at_the_workspace_and_measures_along_its_axis(client: int, elevation: float) -> None:
    spec = side_view(elevation).observation
    add_table(client)
    middle = spec.height // 2
    depth = seen(client, spec, (0, 0, 0))
    assert depth[middle, middle] == pytest.approx(spec.plane_above_tool_m, abs=0.02)
    add_box(client, *WORKSPACE_CENTRE, height=0.1, half=0.05)
    nearer = seen(client, spec, (0, 0, 0))[middle, middle]
    expected = {15: 0.05 / np.cos(np.radians(15)), 45: 0.05 / np.cos(np.radians(45)), 90: 0.1}[int(elevation)]
    assert depth[middle, middle] - nearer == pytest.approx(expected, abs=0.015)


def test_a_side_view_from_straight_above_is_oriented_as_its_spec_says(client: int) -> None:
    spec = side_view(90).observation
    offset = np.array([0.1, 0.05])
    add_table(client)
    add_box(client, *(np.array(WORKSPACE_CENTRE) + offset), height=0.01, half=0.02)
    depth = seen(client, spec, (0, 0, 0))
    found = np.argwhere(depth < depth.max() - 0.005).mean(axis=0)
    np.testing.assert_allclose(found, spec.pixel_of(offset), atol=1.5)


def test_a_misplaced_camera_sees_the_scene_shifted(client: int) -> None:
    add_box(client, 0.0, 0.0, height=0.05, half=0.02)
    depth = seen(client, OBSERVATION, (0, 0, 0.2), Misplacement(x=0.02, y=-0.01))
    found = np.argwhere(depth < depth.max() - 0.02).mean(axis=0)
    np.testing.assert_allclose(found, OBSERVATION.pixel_of(np.array([-0.02, 0.01])), atol=1.0)


@pytest.mark.parametrize("spec", [OBSERVATION, side_view(90).observation], ids=lambda spec: spec.view)
def test_a_camera_that_is_turned_sees_the_scene_turned_the_other_way(client: int, spec: ObservationSpec) -> None:
    """About the tool, or about the workspace's centre, which are the same place here; seen from straight above."""
    x, y, yaw = 0.1, 0.05, 0.3
    centre_x, centre_y = WORKSPACE_CENTRE
    add_table(client)
    add_box(client, centre_x + x, centre_y + y, height=0.01, half=0.02)
    depth = seen(client, spec, (centre_x, centre_y, 0.2), Misplacement(yaw=yaw))
    found = np.argwhere(depth < depth.max() - 0.005).mean(axis=0)
    turned_back = x * math.cos(yaw) + y * math.sin(yaw), y * math.cos(yaw) - x * math.sin(yaw)
    np.testing.assert_allclose(found, spec.pixel_of(np.array(turned_back)), atol=1.5)
