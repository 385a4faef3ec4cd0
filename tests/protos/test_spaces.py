"""Limits belong to fields, conversion has one inverse, and the digest sees every change."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos.errors import LONGEST, Rejected, Status, cut
from protos.spaces import (
    ACTION,
    OBSERVATION,
    PSEUDOSCALAR,
    SCALAR,
    SPEC,
    VECTOR,
    ActionSpec,
    Field,
    GripperState,
    ObservationSpec,
    PolicySpec,
)
from protos.symmetry import Group

actions = hnp.arrays(np.float64, (4, ACTION.size), elements=st.floats(-3, 3))

OTHER_OBSERVATIONS = [
    replace(OBSERVATION, height=64, width=64),
    replace(OBSERVATION, extent_m=0.5),
    replace(OBSERVATION, row_axis=(1, 0)),
    replace(OBSERVATION, col_axis=(0, 1)),
    replace(OBSERVATION, row_axis=(0, -1), col_axis=(-1, 0)),
    replace(OBSERVATION, plane_above_tool_m=0.2),
    replace(OBSERVATION, depth_min_m=0.01),
    replace(OBSERVATION, depth_max_m=0.7),
    replace(OBSERVATION, gripper=GripperState.OPEN_RATIO),
]
OTHER_FIELDS = [
    (0, replace(ACTION.fields[0], high=2.0)),
    (0, replace(ACTION.fields[0], low=-1.0)),
    (1, replace(ACTION.fields[1], limit=0.04)),
    (1, replace(ACTION.fields[1], components=("dy", "dx"))),
    (2, replace(ACTION.fields[2], name="height")),
    (3, replace(ACTION.fields[3], kind=SCALAR)),
    (3, replace(ACTION.fields[3], unit="deg")),
]


def other_action(index: int, field: Field) -> PolicySpec:
    fields = list(ACTION.fields)
    fields[index] = field
    return PolicySpec(OBSERVATION, ActionSpec(tuple(fields)))


OTHER_SPECS = [PolicySpec(o, ACTION) for o in OTHER_OBSERVATIONS] + [other_action(*f) for f in OTHER_FIELDS]


@pytest.mark.parametrize("huge", [1e20, -1e38, 3.4e38])
def test_projection_shortens_what_is_too_large_to_square(huge):
    """To its bound, not to nothing, and never to NaN, which a robot would be told."""
    action = np.array([1.0, huge, 0.0, huge, 0.0], np.float32)
    expected = [1.0, np.copysign(0.05, huge), 0.0, np.copysign(0.05, huge), 0.0]
    np.testing.assert_allclose(ACTION.project(action), expected, rtol=1e-6)


def test_equal_contracts_have_equal_digests():
    whole, real = (replace(OBSERVATION, depth_min_m=zero, depth_max_m=one) for zero, one in ((0, 1), (-0.0, 1.0)))
    assert whole == real
    assert PolicySpec(whole, ACTION).digest == PolicySpec(real, ACTION).digest
    text = SPEC.to_json()
    assert PolicySpec.from_json(text.replace("[-1,0]", "[-1.0,-0.0]")).digest == SPEC.digest
    assert "[-1,0]" in text
    fields = [replace(ACTION.fields[0], low=low, high=high) for low, high in ((0, 1), (0.0, 1.0))]
    assert len({PolicySpec(OBSERVATION, ActionSpec((field,))).digest for field in fields}) == 1


@given(actions)
def test_projection_lands_within_limits_and_stays_there(action):
    once = ACTION.project(action)
    assert (ACTION.magnitudes(once) <= 1 + 1e-9).all()
    np.testing.assert_allclose(ACTION.project(once), once, atol=1e-12)


@given(actions)
def test_projection_leaves_what_is_within_limits(action):
    inside = ACTION.denormalize(ACTION.normalize(ACTION.project(action)) * 0.9)
    np.testing.assert_allclose(ACTION.project(inside), inside, atol=1e-12)


@given(actions)
@pytest.mark.parametrize("element", list(Group(8, reflections=True)), ids=str)
def test_projection_singles_out_no_direction(element, action):
    """Projecting then turning is turning then projecting: a box on (dx, dy) would fail here."""
    centred = action - ACTION.centre  # rho acts on centred quantities
    turned_after = element.action(ACTION.project(action) - ACTION.centre, ACTION)
    turned_before = ACTION.project(element.action(centred, ACTION) + ACTION.centre) - ACTION.centre
    np.testing.assert_allclose(turned_after, turned_before, atol=1e-12)


@given(actions)
def test_normalising_has_an_inverse(action):
    np.testing.assert_allclose(ACTION.denormalize(ACTION.normalize(action)), action, atol=1e-12)


@pytest.mark.parametrize("spec", [SPEC, *OTHER_SPECS])
def test_json_round_trip(spec):
    assert PolicySpec.from_json(spec.to_json()) == spec


def test_every_changed_field_changes_the_digest():
    digests = [spec.digest for spec in (SPEC, *OTHER_SPECS)]
    assert len(set(digests)) == len(digests)


def test_digest_is_a_function_of_content_alone():
    assert PolicySpec(ObservationSpec(), ACTION).digest == PolicySpec.from_json(SPEC.to_json()).digest


def test_a_difference_is_named_with_both_values():
    with pytest.raises(Rejected) as caught:
        SPEC.require_same(PolicySpec(replace(OBSERVATION, extent_m=0.5), ACTION), "the robot")
    assert caught.value.field == "contract.observation.extent_m"
    assert "0.45" in str(caught.value)
    assert "0.5 in the robot" in str(caught.value)
    assert caught.value.status is Status.FAILED_PRECONDITION


def test_an_action_s_field_that_differs_is_named_as_its_contract_names_it():
    gripper, planar, *others = ACTION.fields
    for fields, where in (
        ((gripper, replace(planar, limit=0.02), *others), "contract.action.fields.1[planar].limit"),
        ((planar, gripper, *others), "contract.action.fields.0[gripper]"),
    ):
        with pytest.raises(Rejected) as caught:
            SPEC.require_same(PolicySpec(OBSERVATION, replace(ACTION, fields=fields)), "the robot")
        assert caught.value.field.startswith(where)


def test_a_refusal_of_a_part_says_of_which_and_keeps_the_rest():
    part = Rejected("depth", "metres", "feet", "convert them", Status.OUT_OF_RANGE)
    whole = part.within("episode 3, ")
    assert str(whole) == "episode 3, depth: expected metres, got feet; convert them"
    assert whole.status is Status.OUT_OF_RANGE


@given(st.text(max_size=2000))
def test_a_refusal_fits_a_header_and_any_text_can_be_one(text):
    part = Rejected(text, text, text, text)
    assert all(len(getattr(part, name).encode()) <= LONGEST for name in ("field", "expected", "got", "remedy"))
    assert part.field == text or len(text.encode()) > LONGEST
    assert len(cut("\ud800" + 300 * "\U0001f916").encode()) <= LONGEST


def _without(key):
    tree = json.loads(SPEC.to_json())
    del tree[key]
    return json.dumps(tree)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{}", '"x"', SPEC.to_json()[:-1], _without("action"), _without("observation")]
)
def test_other_json_is_rejected(text):
    with pytest.raises(Rejected):
        PolicySpec.from_json(text)


@pytest.mark.parametrize(
    "changed",
    [
        {"width": 64},
        {"height": 0, "width": 0},
        {"height": 128.0, "width": 128.0},
        {"extent_m": 0.0},
        {"extent_m": math.inf},
        {"plane_above_tool_m": math.nan},
        {"row_axis": (1, 1)},
        {"height": True, "width": True},
        {"row_axis": (-1, False)},
        {"row_axis": (0, -1)},
        {"depth_min_m": -0.1},
        {"depth_max_m": 0.0},
        {"depth_max_m": math.inf},
    ],
)
def test_impossible_views_are_refused(changed):
    with pytest.raises(ValueError, match=r"must be"):
        replace(OBSERVATION, **changed)


@pytest.mark.parametrize(
    "made",
    [
        {"components": ("a",), "kind": VECTOR, "limit": 1.0},
        {"components": ("a", "b"), "kind": SCALAR, "limit": 1.0},
        {"components": ("a",), "kind": SCALAR},
        {"components": ("a",), "kind": SCALAR, "limit": 1.0, "low": 0.0, "high": 1.0},
        {"components": ("a",), "kind": SCALAR, "limit": -1.0},
        {"components": ("a",), "kind": SCALAR, "limit": math.inf},
        {"components": ("a",), "kind": SCALAR, "low": 1.0, "high": 0.0},
        {"components": ("a",), "kind": PSEUDOSCALAR, "low": 0.0, "high": 1.0},
    ],
)
def test_impossible_fields_are_refused(made):
    with pytest.raises(ValueError, match="field broken"):
        Field("broken", unit="1", **made)


def test_component_names_are_distinct():
    with pytest.raises(ValueError, match="distinct"):
        ActionSpec((ACTION.fields[2], replace(ACTION.fields[2], name="again")))


def test_an_unknown_field_is_named():
    with pytest.raises(KeyError, match="planar"):
        ACTION.slice_of("plane")


def test_pixels_lie_where_the_world_is():
    """By hand, in the default view: row 0 looks to +x, column 0 to +y, the middle is the gripper."""
    half, edge = OBSERVATION.extent_m / 2, OBSERVATION.height - 0.5
    np.testing.assert_allclose(OBSERVATION.pixel_of(np.array([half, half])), [-0.5, -0.5])
    np.testing.assert_allclose(OBSERVATION.pixel_of(np.array([-half, half])), [edge, -0.5])
    np.testing.assert_allclose(OBSERVATION.pixel_of(np.array([half, -half])), [-0.5, edge])


def test_axes_are_two_vectors_of_two():
    with pytest.raises(ValueError, match="orthonormal"):
        replace(OBSERVATION, row_axis=(-1, 0, 0), col_axis=(0, -1, 0))


@pytest.mark.parametrize("odd", ['"\\ud800"', "NaN", "[" * 900 + "]" * 900, "7", '""', '"a\\nb"'], ids=ascii)
@pytest.mark.parametrize("place", ['"unit":"m"', '"name":"yaw"', '"components":["dz"]'])
def test_what_a_contract_calls_its_parts_is_text(place, odd):
    """A stranger may send it, and what it says is told, logged and counted by."""
    key = place.partition(":")[0]
    changed = SPEC.to_json().replace(place, f"{key}:[{odd}]" if "[" in place else f"{key}:{odd}")
    assert changed != SPEC.to_json()
    with pytest.raises(Rejected):
        PolicySpec.from_json(changed)


def test_fields_have_names_of_their_own():
    """Of two called the same, one would be looked for in the other's place, and never be bounded."""
    with pytest.raises(ValueError, match="distinct"):
        other_action(3, replace(ACTION.fields[3], name="lift"))
