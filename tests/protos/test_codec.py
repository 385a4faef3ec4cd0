"""What is packed comes back; whatever else comes in is refused with the field's name."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos.codec import pack_action, pack_observation, unpack_action, unpack_observation, unpack_pose
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected
from protos.spaces import ACTION, Observation, Pose
from tests.makers import scene, small_spec

SPEC = small_spec(4).observation
FLOAT32, MILLIMETRES, UINT16 = pb.Observation.FLOAT32_METERS, pb.Observation.UINT16_MILLIMETERS, pb.Observation.UINT16
depths = hnp.arrays(np.float32, SPEC.shape, elements=st.floats(0, float(np.float32(SPEC.depth_max_m)), width=32))


@given(depths, st.sampled_from([0.0, 1.0]))
def test_float32_comes_back_exactly(depth, gripper):
    back = unpack_observation(pack_observation(Observation(depth, gripper), FLOAT32), SPEC)
    np.testing.assert_array_equal(back.depth, depth)
    assert back.gripper == gripper
    assert back.depth.dtype == np.float32


@given(depths)
def test_millimetres_come_back_within_half_a_millimetre(depth):
    back = unpack_observation(pack_observation(Observation(depth, 0.0), MILLIMETRES), SPEC)
    np.testing.assert_allclose(back.depth, depth, atol=0.5e-3 + 1e-6)


@given(depths, st.floats(1e-5, 1e-3))
def test_scaled_counts_come_back_within_half_a_count(depth, scale):
    back = unpack_observation(pack_observation(Observation(depth, 0.0), UINT16, depth_scale=scale), SPEC)
    np.testing.assert_allclose(back.depth, depth, atol=scale / 2 + 1e-6)


def test_bytes_are_row_major_and_little_endian():
    depth = np.zeros(SPEC.shape, np.float32)
    depth[0, 1] = 0.258
    assert pack_observation(Observation(depth, 0.0), MILLIMETRES).depth[:4] == b"\x00\x00\x02\x01"


def test_a_transposed_view_is_packed_in_the_order_it_shows():
    depth = scene(0, small_spec(4)).depth
    back = unpack_observation(pack_observation(Observation(depth.T, 0.0)), SPEC)
    np.testing.assert_array_equal(back.depth, depth.T)


@pytest.mark.parametrize("encoding", [MILLIMETRES, UINT16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 100.0])
def test_counts_hold_no_other_depth(encoding, value):
    depth = np.full(SPEC.shape, value, np.float32)
    with pytest.raises(Rejected, match=r"observation\.depth"):
        pack_observation(Observation(depth, 0.0), encoding)


@given(
    st.builds(
        pb.Observation,
        depth=st.binary(max_size=70) | st.binary(min_size=32, max_size=32) | st.binary(min_size=64, max_size=64),
        encoding=st.integers(0, 5),
        depth_scale=st.floats(width=32),
        height=st.sampled_from([0, 4, 2**32 - 1]),
        width=st.sampled_from([4, 4, 4, 8]),
        gripper=st.floats(width=32),
    )
)
def test_any_message_is_valid_or_rejected(message):
    try:
        observation = unpack_observation(message, SPEC)
    except Rejected:
        return
    assert observation.depth.shape == SPEC.shape
    assert observation.depth.dtype == np.float32
    assert (observation.depth >= 0).all()
    assert (observation.depth <= SPEC.depth_max_m + 0.5e-3 + 1e-6).all()
    assert 0 <= observation.gripper <= 1


@given(st.binary(max_size=200))
def test_any_bytes_parse_to_valid_or_rejected(data):
    try:
        message = pb.Observation.FromString(data)
    except DecodeError:  # grpc turns it into a status
        return
    with pytest.raises(Rejected):
        unpack_observation(message, small_spec(32).observation)


def test_pose_is_optional():
    assert unpack_pose(pack_observation(scene(0))) is None
    pose = Pose(0.4, -0.1, 0.2, 3.0)
    assert unpack_pose(pack_observation(scene(0), pose=pose)) == pose


@pytest.mark.parametrize("name", ["x", "y", "z", "yaw"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pose_is_finite(name, value):
    message = pb.Observation(pose=pb.Pose(**{name: value}))
    with pytest.raises(Rejected, match=rf"observation\.pose\.{name}"):
        unpack_pose(message)


@given(hnp.arrays(np.float32, ACTION.size, elements=st.floats(-1, 1, width=32)))
def test_actions_come_back_in_the_order_of_the_spec(action):
    np.testing.assert_array_equal(unpack_action(pack_action(action, ACTION), ACTION), action)


def test_action_components_have_their_names_on_the_wire():
    message = pack_action(np.array([1, 2, 3, 4, 5], np.float32), ACTION)
    assert (message.p, message.dx, message.dy, message.dz, message.dtheta) == (1, 2, 3, 4, 5)
