"""The last gate: within limits whatever comes, and every change is on record."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos.errors import Rejected, Status
from protos.spaces import ACTION, Pose
from protos.symmetry import QUARTER_TURNS
from serving.envelope import Workspace, limit
from serving.errors import PolicyFault

BOX = Workspace(low=(0.3, -0.2, 0.0), high=(0.7, 0.2, 0.4))
actions = hnp.arrays(np.float32, ACTION.size, elements=st.floats(-4, 4, width=32))
poses = st.builds(Pose, st.floats(0.2, 0.8), st.floats(-0.3, 0.3), st.floats(-0.1, 0.5), st.just(0.0))
inside = st.builds(Pose, st.floats(0.3, 0.7), st.floats(-0.2, 0.2), st.floats(0.0, 0.4), st.just(0.0))


def position_after(pose, action):
    return np.array([pose.x, pose.y, pose.z]) + action[1:4].astype(np.float64)


@given(actions)
def test_every_action_ends_within_limits(action):
    assert (ACTION.magnitudes(limit(action, ACTION).action) <= 1 + 2e-6).all()


@given(actions)
def test_every_change_is_on_record_and_nothing_else_changes(action):
    decision = limit(action, ACTION)
    changed = {i.field for i in decision.interventions}
    for field in ACTION.fields:
        part = ACTION.slice_of(field.name)
        assert (field.name in changed) == (not np.array_equal(decision.action[part], action[part]))
    for i in decision.interventions:
        part = ACTION.slice_of(i.field)
        np.testing.assert_array_equal(np.float32(i.before), action[part])
        np.testing.assert_array_equal(np.float32(i.after), decision.action[part])


@given(actions)
def test_a_vector_keeps_its_direction(action):
    before, after = action[1:3].astype(float), limit(action, ACTION).action[1:3].astype(float)
    assert abs(before[0] * after[1] - before[1] * after[0]) <= 1e-6 * (1 + np.abs(before).max())
    assert before @ after >= 0


@given(actions)
def test_what_was_limited_is_within_limits(action):
    once = limit(action, ACTION)
    assert not limit(once.action, ACTION).interventions


def test_rounding_on_the_bound_is_no_intervention():
    angles = np.linspace(0, 2 * math.pi, 500)
    on_bound = np.zeros((500, ACTION.size), np.float32)
    on_bound[:, 1:3] = 0.05 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    on_bound[:, 3:] = [-0.05, math.pi / 4]
    on_bound *= np.float32(1 + 5e-7)  # four units in the last place, as a chain of float32 operations gathers them
    assert ACTION.magnitudes(on_bound)[:, 1:].min() > 1
    assert not [i for action in on_bound for i in limit(action, ACTION).interventions]


def test_limits_single_out_no_direction():
    action = np.array([0.5, 0.09, 0.04, 0.0, 0.0], np.float32)
    for turn in QUARTER_TURNS:
        turned = turn.action(limit(action, ACTION).action, ACTION)
        np.testing.assert_allclose(limit(turn.action(action, ACTION), ACTION).action, turned, atol=1e-8)


def test_a_record_names_field_rule_and_limit():
    (gripper, planar, yaw) = limit(np.array([-0.5, 0.3, 0.4, 0.01, 2.0], np.float32), ACTION).interventions
    assert (gripper.field, gripper.rule, gripper.after, gripper.limit) == ("gripper", "limit", (0.0,), 0.0)
    assert (planar.field, planar.rule, planar.limit) == ("planar", "limit", 0.05)
    assert planar.after == pytest.approx((0.03, 0.04))
    assert (yaw.field, yaw.limit) == ("yaw", math.pi / 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(ACTION.size))
def test_no_limit_makes_a_motion_of_nan(value, place):
    action = np.zeros(ACTION.size, np.float32)
    action[place] = value
    with pytest.raises(PolicyFault, match="not finite"):
        limit(action, ACTION)


@given(actions, inside)
def test_a_tool_inside_stays_inside(action, pose):
    after = position_after(pose, limit(action, ACTION, pose, BOX).action)
    assert (after >= np.array(BOX.low) - 1e-6).all()
    assert (after <= np.array(BOX.high) + 1e-6).all()


@given(actions, poses)
def test_a_tool_outside_never_gets_further_out(action, pose):
    decision = limit(action, ACTION, pose, BOX)

    def outside(position):
        return np.maximum(np.maximum(BOX.low - position, position - BOX.high), 0)

    before = outside(np.array([pose.x, pose.y, pose.z]))
    assert (outside(position_after(pose, decision.action)) <= before + 1e-6).all()
    assert (ACTION.magnitudes(decision.action) <= 1 + 2e-6).all()


def test_a_workspace_lets_go_what_ends_inside():
    action = np.array([0.5, 0.03, 0.0, -0.05, 0.1], np.float32)
    decision = limit(action, ACTION, Pose(0.5, 0.0, 0.2, 0.0), BOX)
    np.testing.assert_array_equal(decision.action, action)
    assert not decision.interventions


def test_the_floor_stops_the_lift_alone():
    action = np.array([0.5, 0.03, 0.0, -0.05, 0.1], np.float32)
    decision = limit(action, ACTION, Pose(0.5, 0.0, 0.02, 0.0), BOX)
    np.testing.assert_allclose(decision.action, [0.5, 0.03, 0.0, -0.02, 0.1], atol=1e-7)
    assert [(i.field, i.rule, i.limit) for i in decision.interventions] == [("lift", "workspace", 0.0)]


def test_a_workspace_needs_to_know_where_the_tool_is():
    with pytest.raises(Rejected, match=r"observation\.pose") as refused:
        limit(np.zeros(ACTION.size, np.float32), ACTION, None, BOX)
    assert refused.value.status is Status.FAILED_PRECONDITION


def test_a_workspace_has_an_inside():
    with pytest.raises(ValueError, match="low < high"):
        Workspace(low=(0.3, 0.2, 0.0), high=(0.7, -0.2, 0.4))
