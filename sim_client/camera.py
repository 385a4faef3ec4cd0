"""The robot's eye: depth in metres from PyBullet's software renderer. Its unit changes here and never again."""

import math
from dataclasses import dataclass

import numpy as np
import pybullet as p
from numpy.typing import NDArray

from protos.spaces import ObservationSpec, View
from sim_client.arm import WORKSPACE_CENTRE
from sim_client.randomization import Misplacement

# An orthographic camera looks down from this far above the view's own camera plane. TinyRenderer silently drops
# geometry nearer than n' of `metres_of` (0.54 m for these planes), so the camera stands well back.
STAND_OFF_M = 0.7
NEAR_M, FAR_M = 0.1, 2.05
NOTHING = 0.9999999
"""The depth buffer's value where nothing was drawn is 1."""


@dataclass(frozen=True)
class Frame:
    """depth: float32 [H, W] metres from the camera plane; rgb: uint8 [H, W, 3], of a view in colour."""

    depth: NDArray[np.float32]
    rgb: NDArray[np.uint8] | None


def orthographic(half_m: float, near: float, far: float, pixels: int) -> tuple[float, ...]:
    """A column-major orthographic projection of a square of side 2 `half_m` on `pixels` x `pixels`.

    TinyRenderer samples a pixel at its corner, which shifts the scene by half a pixel up and to the right; the last
    row shifts it back, so that turning the scene by 90 degrees turns the image exactly. It draws nothing at all when
    far - near exceeds 2.
    """
    return (
        1 / half_m, 0, 0, 0,
        0, 1 / half_m, 0, 0,
        0, 0, -2 / (far - near), 0,
        -1 / pixels, -1 / pixels, -(far + near) / (far - near), 1,
    )  # fmt: skip


def metres_of(buffer: NDArray[np.float32], near: float, far: float) -> NDArray[np.float32]:
    """Distance from an orthographic TinyRenderer camera, metres, of its depth buffer.

    TinyRenderer writes depth as if every projection were a perspective one. An orthographic matrix with planes n, f
    has the depth terms of a perspective matrix with planes n' = (f + n) / (2 + f - n), f' = (f + n) / (2 - f + n);
    inverting *that* gives metres. The linear formula is off by centimetres except near 1 m.
    """
    n = (far + near) / (2 + far - near)
    f = (far + near) / (2 - far + near)
    return ((f * n / (n - f)) / (buffer - f / (f - n))).astype(np.float32)


class TopDown:
    """The top-down orthographic depth view of `spec`, centred on the tool.

    The table is not drawn: it is what the camera sees where it sees nothing, at the distance that its height says.
    Three quarters of a frame's pixels, and of its time.
    """

    def __init__(self, client: int, spec: ObservationSpec) -> None:
        self._client, self._spec = client, spec
        self._projection = orthographic(spec.extent_m / 2, NEAR_M, FAR_M, spec.height)

    def look(self, tool_xyz: tuple[float, float, float], error: Misplacement) -> Frame:
        """What the camera sees, `error` away from where it should be."""
        x, y, z = tool_xyz[0] + error.x, tool_xyz[1] + error.y, tool_xyz[2] + error.z
        plane = z + self._spec.plane_above_tool_m
        # Up in the image is against the direction in which rows grow; a camera cannot mirror, so that fixes columns.
        up = -np.array(self._spec.row_axis, float)
        cos, sin = math.cos(error.yaw), math.sin(error.yaw)
        view = p.computeViewMatrix(
            (x, y, plane + STAND_OFF_M), (x, y, 0), (cos * up[0] - sin * up[1], sin * up[0] + cos * up[1], 0)
        )
        _, buffer = _render(self._client, self._spec, view, self._projection)
        depth = metres_of(buffer, NEAR_M, FAR_M) - np.float32(STAND_OFF_M)
        depth = np.where(buffer < NOTHING, depth, np.float32(plane))
        if self._spec.handedness < 0:
            depth = depth[:, ::-1]
        return Frame(np.clip(depth, self._spec.depth_min_m, self._spec.depth_max_m), None)


class Side:
    """A fixed perspective camera in front of the robot: depth along its axis, and colour."""

    def __init__(self, client: int, spec: ObservationSpec) -> None:
        self._client, self._spec = client, spec
        self._near, self._far = 0.1, spec.depth_max_m
        fov = 2 * math.degrees(math.atan(spec.extent_m / 2 / spec.plane_above_tool_m))
        projection = list(p.computeProjectionMatrixFOV(fov, 1.0, self._near, self._far))
        projection[8] = projection[9] = 1 / spec.height  # the half pixel, see `orthographic`
        self._projection = tuple(projection)

    def look(self, tool_xyz: tuple[float, float, float], error: Misplacement) -> Frame:
        """What the camera sees, `error` away from where it should be; the tool is wherever the tool is."""
        elevation, away = math.radians(self._spec.elevation_deg), self._spec.plane_above_tool_m
        centre = np.array([*WORKSPACE_CENTRE, 0.0])
        out = np.array([math.cos(error.yaw), math.sin(error.yaw), 0])
        eye = centre + away * (math.cos(elevation) * out + math.sin(elevation) * np.array([0, 0, 1]))
        shift = (error.x, error.y, error.z)
        view = p.computeViewMatrix(eye + shift, centre + shift, math.cos(elevation) * np.array([0, 0, 1]) - out)
        rgb, buffer = _render(self._client, self._spec, view, self._projection)
        depth = self._far * self._near / (self._far - (self._far - self._near) * buffer)
        return Frame(np.clip(depth, self._spec.depth_min_m, self._spec.depth_max_m).astype(np.float32), rgb)


Camera = TopDown | Side


def camera(client: int, spec: ObservationSpec) -> Camera:
    """The camera that `spec` describes."""
    return (TopDown if spec.view is View.TOPDOWN else Side)(client, spec)


def _render(
    client: int, spec: ObservationSpec, view: tuple[float, ...], projection: tuple[float, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    _, _, rgba, buffer, _ = p.getCameraImage(
        spec.width,
        spec.height,
        view,
        projection,
        shadow=0,
        renderer=p.ER_TINY_RENDERER,
        flags=p.ER_NO_SEGMENTATION_MASK,
        physicsClientId=client,
    )
    rgb = np.reshape(np.asarray(rgba, np.uint8), (*spec.shape, 4))[..., :3]
    return rgb, np.reshape(np.asarray(buffer, np.float32), spec.shape)
