"""The last gate: within limits whatever comes, and every change is on record."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status
from protos.spaces import ACTION, ActionSpec, GripperState, Kind, ObservationSpec, PolicySpec, Pose
from protos.symmetry import Group
from serving.envelope import Decision, Envelope, Limits, Workspace
from tests.makers import small_spec

SPEC = small_spec()
BOX = Workspace(low=(0.3, -0.2, 0.0), high=(0.7, 0.2, 0.4))
actions = hnp.arrays(np.float32, ACTION.size, elements=st.floats(-4, 4, width=32))
poses = st.builds(Pose, st.floats(0.2, 0.8), st.floats(-0.3, 0.3), st.floats(-0.1, 0.5), st.just(0.0))
inside = st.builds(Pose, st.floats(0.3, 0.7), st.floats(-0.2, 0.2), st.floats(0.0, 0.4), st.just(0.0))


def limit(action, pose=None, workspace=None, previous=None, **limits) -> Decision:
    return Envelope(SPEC, Limits(workspace=workspace, **limits)).decide(action, pose=pose, previous=previous)


def position_after(pose, action):
    return np.array([pose.x, pose.y, pose.z]) + action[1:4].astype(np.float64)


@given(actions)
def test_every_action_ends_within_limits(action):
    assert (ACTION.magnitudes(limit(action).action) <= 1 + 2e-6).all()


@given(actions)
def test_every_change_is_on_record_and_nothing_else_changes(action):
    decision = limit(action)
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
    before, after = action[1:3].astype(float), limit(action).action[1:3].astype(float)
    assert abs(before[0] * after[1] - before[1] * after[0]) <= 1e-6 * (1 + np.abs(before).max())
    assert before @ after >= 0


@given(actions)
def test_what_was_limited_is_within_limits(action):
    once = limit(action)
    assert not limit(once.action).interventions


def test_rounding_on_the_bound_is_no_intervention():
    angles = np.linspace(0, 2 * math.pi, 500)
    on_bound = np.zeros((500, ACTION.size), np.float32)
    on_bound[:, 1:3] = 0.05 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    on_bound[:, 3:] = [-0.05, math.pi / 4]
    on_bound *= np.float32(1 + 5e-7)  # four units in the last place, as a chain of float32 operations gathers them
    assert ACTION.magnitudes(on_bound)[:, 1:].min() > 1
    assert not [i for action in on_bound for i in limit(action).interventions]


def test_limits_single_out_no_direction():
    """Not even between the axes: a box on (dx, dy) goes along with quarter turns, too."""
    action = np.array([0.5, 0.09, 0.04, 0.0, 0.0], np.float32)
    for turn in Group(8):
        turned = turn.action(limit(action).action, ACTION)
        np.testing.assert_allclose(limit(turn.action(action, ACTION)).action, turned, atol=2e-8)


def test_a_record_names_field_rule_and_limit():
    (gripper, planar, yaw) = limit(np.array([-0.5, 0.3, 0.4, 0.01, 2.0], np.float32)).interventions
    assert (gripper.field, gripper.rule, gripper.after, gripper.limit) == ("gripper", "limit", (0.0,), 0.0)
    assert (planar.field, planar.rule, planar.limit) == ("planar", "limit", 0.05)
    assert planar.after == pytest.approx((0.03, 0.04))
    assert (yaw.field, yaw.limit) == ("yaw", math.pi / 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(ACTION.size))
@pytest.mark.parametrize("holding", [0.0, 1.0])
def test_what_is_no_number_means_to_stay(value, place, holding):
    action = np.full(ACTION.size, 0.01, np.float32)
    action[place] = value
    decision = Envelope(SPEC).decide(action, gripper=holding)
    assert decision.hold
    np.testing.assert_array_equal(decision.action, [1 - holding, 0, 0, 0, 0])
    assert {i.field for i in decision.interventions} == {f.name for f in ACTION.fields}
    assert {i.rule for i in decision.interventions} == {"not_finite"}


def test_a_hold_leaves_the_gripper_as_it_was_told():
    action, before = np.full(ACTION.size, np.nan, np.float32), np.array([0.25, 0.01, 0, 0, 0], np.float32)
    np.testing.assert_array_equal(Envelope(SPEC).decide(action, previous=before).action, [0.25, 0, 0, 0, 0])


def test_a_hand_that_knows_its_opening_keeps_it():
    spec = PolicySpec(ObservationSpec(gripper=GripperState.OPEN_RATIO), ACTION)
    np.testing.assert_allclose(spec.hold(0.3), [0.3, 0, 0, 0, 0], atol=1e-7)


def test_an_action_is_not_believed_where_the_rest_is_no_number():
    decision = Envelope(SPEC).decide(np.full(ACTION.size, 0.01, np.float32), sound=False)
    assert decision.hold
    np.testing.assert_array_equal(decision.action[1:], 0)


TIGHT = {"fields": {"planar": 0.02, "yaw": 0.3}, "step_m": 0.03, "jump_m": 0.025, "jump_rad": 0.2}


@given(actions, actions)
def test_tighter_limits_hold_together(action, before):
    first = limit(before, **TIGHT).action
    moved = limit(action, previous=first, **TIGHT).action.astype(float)
    assert np.hypot(*moved[1:3]) <= 0.02 * (1 + 1e-6)
    assert abs(moved[4]) <= 0.3 * (1 + 1e-6)
    assert np.linalg.norm(moved[1:4]) <= 0.03 * (1 + 1e-6)
    assert np.linalg.norm(moved[1:4] - first[1:4]) <= 0.025 * (1 + 1e-6)
    assert abs(moved[4] - first[4]) <= 0.2 * (1 + 1e-6)


@given(actions, actions, inside)
def test_a_wall_stops_even_what_was_moving(action, before, pose):
    first = limit(before, **TIGHT).action
    after = position_after(pose, limit(action, pose, BOX, first, **TIGHT).action)
    assert (after >= np.array(BOX.low) - 1e-6).all()
    assert (after <= np.array(BOX.high) + 1e-6).all()


def test_a_jump_is_shortened_towards_the_wish():
    before, wish = np.array([1, 0.03, 0, 0, 0], np.float32), np.array([1, -0.03, 0, 0, 0.4], np.float32)
    decision = limit(wish, previous=before, jump_m=0.02, jump_rad=0.1)
    np.testing.assert_allclose(decision.action, [1, 0.01, 0, 0, 0.1], atol=1e-7)
    assert [(i.field, i.rule, i.limit) for i in decision.interventions] == [
        ("planar", "jump", 0.02),
        ("yaw", "jump", 0.1),
    ]


def test_of_an_arm_at_rest_every_motion_is_a_jump_from_none():
    before, wish = np.array([0.2, 0.03, 0, 0, -0.4], np.float32), np.array([0.7, 0.03, 0, 0.04, 0.4], np.float32)
    kept = Envelope(SPEC, Limits(jump_m=0.02, jump_rad=0.1))
    for previous in (before, None):
        moved = kept.decide(wish, previous=previous, at_rest=True)
        np.testing.assert_allclose(moved.action, [0.7, 0.012, 0, 0.016, 0.1], atol=1e-7)
        assert {i.rule for i in moved.interventions} == {"jump"}
    held = kept.decide(np.full(5, np.nan, np.float32), previous=before, at_rest=True)
    np.testing.assert_array_equal(held.action, np.float32([0.2, 0, 0, 0, 0]))


@pytest.mark.parametrize("kind", [Kind.PSEUDOSCALAR, Kind.SCALAR])  # under rotations alone, yaw may be either
def test_a_sudden_turn_is_shortened_whatever_its_kind(kind):
    *others, yaw = ACTION.fields
    spec = PolicySpec(SPEC.observation, ActionSpec((*others, replace(yaw, kind=kind))))
    before, wish = np.zeros(5, np.float32), np.zeros(5, np.float32)
    before[-1], wish[-1] = -yaw.limit, yaw.limit
    decision = Envelope(spec, Limits(jump_rad=0.1)).decide(wish, previous=before)
    assert decision.action[-1] == pytest.approx(0.1 - yaw.limit)
    assert [i.rule for i in decision.interventions] == ["jump"]


def test_the_floor_is_known_by_its_name():
    action = np.array([0.5, 0.0, 0.0, -0.05, 0.0], np.float32)
    decision = limit(action, Pose(0.5, 0.0, 0.04, 0.0), BOX, z_floor_m=0.02)
    assert [(i.field, i.rule, i.limit) for i in decision.interventions] == [("lift", "z_floor", 0.02)]
    assert decision.action[3] == pytest.approx(-0.02)
    with pytest.raises(Rejected, match=r"observation\.pose"):
        limit(action, z_floor_m=0.02)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"planar": 0.06}, "never widened"),
        ({"planar": 0.0}, "positive"),
        ({"planar": -0.01}, "positive"),
        ({"planar": math.nan}, "positive"),
        ({"lift": math.inf}, "positive"),
        ({"gripper": 0.5}, "unknown"),
        ({"workspace": 0.5}, "unknown"),
        ({"nothing\n": 0.5}, "unknown"),
        ({"z_floor_m": -0.1}, "never widened"),
        ({"step_m": 0.2}, "never widened"),
    ],
)
def test_limits_are_tightened_and_never_widened(asked, words):
    held = Limits(step_m=0.1, z_floor_m=0.0)
    with pytest.raises(Rejected, match=words) as refused:
        held.tightened(asked, ACTION)
    assert refused.value.field.startswith("limits[")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("floor", [0.01, 0.02, 0.7, -0.1])
def test_limits_may_be_repeated_as_they_travel(floor):
    held = Limits(step_m=0.1, jump_rad=0.3, z_floor_m=floor)
    sent = pb.StartEpisodeRequest(limits={n: v for n, v in held.in_force(ACTION).items() if math.isfinite(v)}).limits
    assert held.tightened(sent, ACTION).z_floor_m >= floor


def test_limits_of_a_server_bound_every_policy_by_the_tighter():
    envelope = Envelope(SPEC, Limits({"planar": 0.5, "lift": 0.01}))
    assert envelope.limits.in_force(ACTION)["planar"] == 0.05
    assert envelope.limits.in_force(ACTION)["lift"] == 0.01


def test_random_outputs_stay_within_every_limit():
    outside, silent = random_outputs_outside(30_000)
    assert (outside, silent) == (0, 0)


def random_outputs_outside(count):
    """Of so many random outputs, NaN and infinities among them: how many left outside a limit, or changed silently."""
    rng = np.random.default_rng(0)
    limits = Limits(TIGHT["fields"], TIGHT["step_m"], TIGHT["jump_m"], TIGHT["jump_rad"], 0.02, BOX)
    envelope, low, high = Envelope(SPEC, limits), np.maximum(BOX.low, [-9, -9, 0.02]), np.array(BOX.high)
    scale = np.exp(rng.uniform(-8, 8, (count, 1)))
    outputs = (rng.standard_normal((count, ACTION.size)) * scale).astype(np.float32)
    special = rng.random(outputs.shape) < 0.01
    outputs[special] = rng.choice(np.float32([np.nan, np.inf, -np.inf, 0, -0.0, 3e38, 1e-45]), special.sum())
    positions = rng.uniform(low, high, (count, 3))
    actions = np.empty_like(outputs)
    silent = jumped = 0
    previous = None
    for i in range(count):
        if i % 50 == 0:
            previous = None
        decision = envelope.decide(outputs[i], pose=Pose(*positions[i], 0.0), previous=previous)
        differs = decision.action != outputs[i]
        changed = {f.name for f in ACTION.fields if differs[ACTION.slice_of(f.name)].any()}
        silent += not changed <= {change.field for change in decision.interventions}
        free = not decision.hold and not {"workspace", "z_floor"} & {change.rule for change in decision.interventions}
        if previous is not None and free:  # to stay inside, and to stop, comes before to move smoothly
            jump = decision.action.astype(float) - previous
            within = np.linalg.norm(jump[1:4]) <= limits.jump_m + 1e-6 and abs(jump[4]) <= limits.jump_rad + 1e-6
            jumped += not within
        actions[i] = previous = decision.action
    exact, slack = actions.astype(float), 1 + 1e-6
    after = positions + exact[:, 1:4]
    within = (
        np.isfinite(exact).all(axis=1)
        & (np.abs(exact[:, 0] - 0.5) <= 0.5)
        & (np.hypot(exact[:, 1], exact[:, 2]) <= TIGHT["fields"]["planar"] * slack)
        & (np.linalg.norm(exact[:, 1:4], axis=1) <= TIGHT["step_m"] * slack)
        & (np.abs(exact[:, 4]) <= TIGHT["fields"]["yaw"] * slack)
        & (after >= low - 1e-7).all(axis=1)
        & (after <= high + 1e-7).all(axis=1)
    )
    return int((~within).sum()) + jumped, silent


@given(actions, inside)
def test_a_tool_inside_stays_inside(action, pose):
    after = position_after(pose, limit(action, pose, BOX).action)
    assert (after >= np.array(BOX.low) - 1e-6).all()
    assert (after <= np.array(BOX.high) + 1e-6).all()


@given(actions, poses)
def test_a_tool_outside_never_gets_further_out(action, pose):
    decision = limit(action, pose, BOX)

    def outside(position):
        return np.maximum(np.maximum(BOX.low - position, position - BOX.high), 0)

    before = outside(np.array([pose.x, pose.y, pose.z]))
    assert (outside(position_after(pose, decision.action)) <= before + 1e-6).all()
    assert (ACTION.magnitudes(decision.action) <= 1 + 2e-6).all()


def test_a_workspace_lets_go_what_ends_inside():
    action = np.array([0.5, 0.03, 0.0, -0.05, 0.1], np.float32)
    decision = limit(action, Pose(0.5, 0.0, 0.2, 0.0), BOX)
    np.testing.assert_array_equal(decision.action, action)
    assert not decision.interventions


def test_the_floor_stops_the_lift_alone():
    action = np.array([0.5, 0.03, 0.0, -0.05, 0.1], np.float32)
    decision = limit(action, Pose(0.5, 0.0, 0.02, 0.0), BOX)
    np.testing.assert_allclose(decision.action, [0.5, 0.03, 0.0, -0.02, 0.1], atol=1e-7)
    assert [(i.field, i.rule, i.limit) for i in decision.interventions] == [("lift", "workspace", 0.0)]


def test_a_workspace_needs_to_know_where_the_tool_is():
    with pytest.raises(Rejected, match=r"observation\.pose") as refused:
        limit(np.zeros(ACTION.size, np.float32), None, BOX)
    assert refused.value.status is Status.FAILED_PRECONDITION


def test_a_workspace_has_an_inside():
    with pytest.raises(ValueError, match="low < high"):
        Workspace(low=(0.3, 0.2, 0.0), high=(0.7, -0.2, 0.4))


@pytest.mark.parametrize(
    ("pose", "field"),
    [
        (Pose(450.0, 0.0, 20.0, 0.0), "x"),  # millimetres
        (Pose(0.5, -1.3, 0.2, 0.0), "y"),
        (Pose(0.5, 0.0, 20.0, 0.0), "z"),
    ],
)
def test_a_pose_in_another_unit_or_frame_is_refused(pose, field):
    """All its motions would lead inwards, and none be stopped."""
    with pytest.raises(Rejected, match=f"pose.{field}.*check unit and frame") as refused:
        Envelope(SPEC, Limits(workspace=BOX)).require_pose(pose)
    assert refused.value.status is Status.INVALID_ARGUMENT


def test_a_floor_alone_knows_a_pose_in_millimetres():
    floor = Envelope(SPEC, Limits(z_floor_m=0.02))
    floor.require_pose(Pose(0.5, 0.0, 5.0, 0.0))
    with pytest.raises(Rejected, match=r"pose\.z"):
        floor.require_pose(Pose(0.5, 0.0, 20.0, 0.0))


def test_a_floor_above_the_workspace_is_refused():
    with pytest.raises(Rejected, match=r"z_floor_m.*below 0\.4 m"):
        Envelope(SPEC, Limits(workspace=BOX, z_floor_m=0.4))
