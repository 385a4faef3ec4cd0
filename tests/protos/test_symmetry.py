"""rho is a representation, and images turn as the world does, whatever the view's axes."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from protos.spaces import ACTION, OBSERVATION, Observation
from protos.symmetry import EIGHTH_TURN, QUARTER_TURNS, Element, Group

UNITS = [(1, 0), (-1, 0), (0, 1), (0, -1)]
CONVENTIONS = [(row, col) for row, col in product(UNITS, UNITS) if row[0] * col[0] + row[1] * col[1] == 0]
GROUPS = [Group(4), Group(8), Group(16), Group(4, reflections=True), Group(8, reflections=True)]
EXACT = list(Group(4, reflections=True))


def view(convention, size=16):
    row_axis, col_axis = convention
    return replace(OBSERVATION, height=size, width=size, row_axis=row_axis, col_axis=col_axis)


def test_there_are_eight_axis_conventions():
    assert len(CONVENTIONS) == 8


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.name)
def test_rho_is_closed_under_products_and_inverses(group):
    matrices = [g.rho(ACTION) for g in group]

    def index_of(matrix):
        (found,) = [i for i, m in enumerate(matrices) if np.allclose(m, matrix, atol=1e-12)]
        return found

    size = len(matrices)
    table = np.array([[index_of(a @ b) for b in matrices] for a in matrices])
    assert size == group.order * (2 if group.reflections else 1)
    assert (np.sort(table, axis=0) == np.arange(size)[:, None]).all()  # a Latin square: every inverse is there
    assert (np.sort(table, axis=1) == np.arange(size)).all()
    np.testing.assert_allclose(matrices[0], np.eye(ACTION.size))


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.name)
def test_rho_preserves_sizes(group):
    for g in group:
        np.testing.assert_allclose(g.rho(ACTION) @ g.rho(ACTION).T, np.eye(ACTION.size), atol=1e-12)


def test_a_turn_moves_planar_motion_alone():
    action = np.array([0.5, 0.03, 0.0, 0.01, 0.2])
    np.testing.assert_allclose(Element(math.pi / 2).action(action, ACTION), [0.5, 0.0, 0.03, 0.01, 0.2], atol=1e-12)


def test_a_reflection_changes_the_sign_of_y_and_of_yaw():
    action = np.array([0.5, 0.03, 0.02, 0.01, 0.2])
    np.testing.assert_allclose(Element(0.0, flip=True).action(action, ACTION), [0.5, 0.03, -0.02, 0.01, -0.2])


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
@pytest.mark.parametrize("element", EXACT, ids=str)
def test_a_bright_pixel_lands_where_the_world_point_goes(element, convention):
    spec = view(convention)
    for point in np.array([[0.11, 0.02], [-0.05, 0.17], [-0.2, -0.13]]):
        row, col = np.rint(spec.pixel_of(point)).astype(int)
        image = np.zeros(spec.shape, np.float32)
        image[row, col] = 1.0
        centre = (np.array([row, col]) - spec.pixel_of(np.zeros(2))) @ np.array([spec.row_axis, spec.col_axis])
        moved = element.planar @ (centre * spec.extent_m / spec.height)
        expected = np.rint(spec.pixel_of(moved)).astype(int)
        np.testing.assert_array_equal(np.argwhere(element.image(image, spec)), [expected])


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
@pytest.mark.parametrize("turn", [EIGHTH_TURN, Element(0.3), Element(-1.1), Element(0.7, flip=True)], ids=str)
def test_a_blob_turns_by_any_angle_to_within_a_pixel(turn, convention):
    spec = view(convention, size=64)
    point = np.array([0.09, -0.05])
    pixels = np.indices(spec.shape).transpose(1, 2, 0)
    blob = np.exp(-np.square(pixels - spec.pixel_of(point)).sum(-1) / 8.0)
    turned = turn.image(blob, spec)
    centroid = (pixels * turned[..., None]).sum((0, 1)) / turned.sum()
    assert np.linalg.norm(centroid - spec.pixel_of(turn.planar @ point)) < 0.2


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
def test_quarter_turns_of_images_compose(convention):
    spec = view(convention)
    image = np.random.default_rng(0).random((3, *spec.shape)).astype(np.float32)
    once, twice, thrice = QUARTER_TURNS
    np.testing.assert_array_equal(once.image(once.image(image, spec), spec), twice.image(image, spec))
    np.testing.assert_array_equal(once.image(twice.image(image, spec), spec), thrice.image(image, spec))
    np.testing.assert_array_equal(once.image(thrice.image(image, spec), spec), image)


def test_turning_an_observation_keeps_the_gripper():
    observation = Observation(np.zeros(OBSERVATION.shape, np.float32), 1.0)
    assert EIGHTH_TURN.observation(observation, OBSERVATION).gripper == 1.0


@pytest.mark.parametrize("name", ["C4", "C8", "C16", "D4", "D8"])
def test_groups_parse_to_their_name(name):
    assert Group.parse(name).name == name


@pytest.mark.parametrize("name", ["", "C", "8", "E8", "C-4", "C0", "D0", "c8", "C8 "])
def test_other_names_are_no_groups(name):
    with pytest.raises(ValueError, match="group"):
        Group.parse(name)
