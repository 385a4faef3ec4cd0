"""Messages <-> numpy, both directions side by side, for server and client alike. Untrusted bytes are checked here."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected
from protos.spaces import ActionSpec, Observation, ObservationSpec, Pose

Encoding = pb.Observation.Encoding
MILLIMETRE = 1e-3
_EPSILON = float(np.finfo(np.float32).eps)
_DTYPES: dict[int, np.dtype[Any]] = {
    pb.Observation.FLOAT32_METERS: np.dtype("<f4"),
    pb.Observation.UINT16_MILLIMETERS: np.dtype("<u2"),
    pb.Observation.UINT16: np.dtype("<u2"),
}


def pack_observation(
    observation: Observation,
    encoding: pb.Observation.Encoding = pb.Observation.FLOAT32_METERS,
    *,
    depth_scale: float = MILLIMETRE,
    pose: Pose | None = None,
    age_us: int = 0,
) -> pb.Observation:
    """Encode one observation. `depth_scale` (metres per count) is read with UINT16 only."""
    depth = observation.depth
    if encoding == pb.Observation.FLOAT32_METERS:
        pixels = np.ascontiguousarray(depth, "<f4")
        scale = 0.0
    else:
        scale = depth_scale if encoding == pb.Observation.UINT16 else MILLIMETRE
        counts = np.rint(np.asarray(depth) / scale)
        if not (np.isfinite(counts).all() and counts.min() >= 0 and counts.max() <= np.iinfo(np.uint16).max):
            raise Rejected(
                "observation.depth",
                f"0 to {np.iinfo(np.uint16).max * scale:g} m, finite",
                f"{depth.min():g} to {depth.max():g} m",
                "send FLOAT32_METERS or a larger depth_scale",
            )
        pixels = counts.astype("<u2")
    return pb.Observation(
        depth=pixels.tobytes(),
        encoding=encoding,
        depth_scale=scale if encoding == pb.Observation.UINT16 else 0.0,
        height=depth.shape[0],
        width=depth.shape[1],
        gripper=observation.gripper,
        pose=pb.Pose(x=pose.x, y=pose.y, z=pose.z, yaw=pose.yaw) if pose else None,
        age_us=age_us,
    )


def unpack_observation(message: pb.Observation, spec: ObservationSpec) -> Observation:
    """Decode and check one observation.

    Returns:
        depth float32 [H, W] in metres, oriented as `spec` says (for FLOAT32_METERS a read-only view of the message);
        gripper in [0, 1].

    Raises:
        Rejected: naming the field, when size, encoding, range or finiteness differ from `spec`; nothing is clipped.
    """
    dtype = _DTYPES.get(message.encoding)
    if dtype is None:
        known = ", ".join(Encoding.Name(e) for e in _DTYPES)
        came = Encoding.Name(message.encoding) if message.encoding in Encoding.values() else str(message.encoding)
        raise Rejected("observation.encoding", known, came, "say how the depth bytes are to be read")
    for name, got, expected in (
        ("height", message.height, spec.height),
        ("width", message.width, spec.width),
    ):
        if got != expected:
            raise Rejected(f"observation.{name}", f"{expected} pixels", str(got), "resize to the policy's view")
    size, pixels = spec.height * spec.width * dtype.itemsize, message.depth  # which is copied whenever it is read
    if len(pixels) != size:
        raise Rejected(
            "observation.depth",
            f"{size} bytes ({spec.height} x {spec.width} x {dtype.itemsize})",
            f"{len(pixels)} bytes",
        )
    depth: NDArray[Any] = np.frombuffer(pixels, dtype).reshape(spec.shape)
    if dtype.kind == "u":
        depth = _metres(depth, message)
    low, high, slack = float(depth.min()), float(depth.max()), _rounding_m(message, spec)
    if dtype.kind == "f" and not math.isfinite(low + high):  # a NaN anywhere is the minimum and the maximum
        bad = np.argwhere(~np.isfinite(depth))
        row, col = bad[0]
        raise Rejected(
            "observation.depth",
            "finite metres",
            f"{len(bad)} non-finite pixels, the first at row {row}, column {col}",
            "fill missing pixels before sending",
        )
    if low < max(spec.depth_min_m - slack, 0.0) or high > spec.depth_max_m + slack:
        raise Rejected(
            "observation.depth",
            f"{spec.depth_min_m:g} to {spec.depth_max_m:g} m",
            f"{low:g} to {high:g} m",
            "check the unit: depth is in metres below the view's camera plane",
        )
    if not 0.0 <= message.gripper <= 1.0:  # also refuses NaN
        raise Rejected("observation.gripper", f"0 to 1 ({spec.gripper})", f"{message.gripper:g}")
    return Observation(depth.astype(np.float32, copy=False), message.gripper)


def _rounding_m(message: pb.Observation, spec: ObservationSpec) -> float:
    """How far a depth on the edge of the range may come out beyond it: float32(0.6) > 0.6, and counts are rounded."""
    count = 0.0 if message.encoding == pb.Observation.FLOAT32_METERS else _metres_per_count(message)
    return min(count, MILLIMETRE) / 2 + _EPSILON * spec.depth_max_m


def _metres_per_count(message: pb.Observation) -> float:
    return message.depth_scale if message.encoding == pb.Observation.UINT16 else MILLIMETRE


def _metres(counts: NDArray[np.uint16], message: pb.Observation) -> NDArray[np.float32]:
    scale = _metres_per_count(message)
    if not (math.isfinite(scale) and scale > 0):
        raise Rejected("observation.depth_scale", "metres per count, positive", f"{scale:g}")
    with np.errstate(over="ignore"):  # infinity is refused with everything else out of range
        return counts.astype(np.float32) * np.float32(scale)


def unpack_pose(message: pb.Observation) -> Pose | None:
    """The pose that came with an observation, or None. Raises Rejected when it is not finite."""
    if not message.HasField("pose"):
        return None
    sent = message.pose
    values = sent.x, sent.y, sent.z, sent.yaw
    for name, value in zip(("x", "y", "z", "yaw"), values, strict=True):
        if not math.isfinite(value):
            raise Rejected(f"observation.pose.{name}", "a finite number", str(value))
    return Pose(*values)


def pack_action(action: NDArray[np.floating], spec: ActionSpec) -> pb.Action:
    """[size] in the order of `spec` -> message."""
    return pb.Action(**dict(zip(spec.components, action.tolist(), strict=True)))


def unpack_action(message: pb.Action, spec: ActionSpec) -> NDArray[np.float32]:
    """Message -> float32 [size] in the order of `spec`."""
    return np.array([getattr(message, c) for c in spec.components], np.float32)
