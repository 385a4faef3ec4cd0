"""The robot's eye: depth in metres from PyBullet's software renderer. Its unit changes here and never again."""

from collections.abc import Callable

import numpy as np
import pybullet as p
from numpy.typing import NDArray

from protos.spaces import ObservationSpec

# An orthographic camera looks down from this far above the view's own camera plane. TinyRenderer silently drops
# geometry nearer than n' of `metres_of` (0.54 m for these planes), so the camera stands well back.
STAND_OFF_M = 0.7
NEAR_M, FAR_M = 0.1, 2.05


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


class Camera:
    """The top-down orthographic depth view of `spec`, centred on the tool."""

    def __init__(self, client: int, spec: ObservationSpec) -> None:
        self._client, self._spec = client, spec
        self._projection = orthographic(spec.extent_m / 2, NEAR_M, FAR_M, spec.height)

    def depth(self, tool_xyz: tuple[float, float, float]) -> NDArray[np.float32]:
        """float32 [H, W]: metres below the camera plane, which lies `plane_above_tool_m` above the tool centre."""
        x, y, z = tool_xyz
        eye = z + self._spec.plane_above_tool_m + STAND_OFF_M
        # Up in the image is against the direction in which rows grow; a camera cannot mirror, so that fixes columns.
        up = (-self._spec.row_axis[0], -self._spec.row_axis[1], 0)
        view = p.computeViewMatrix((x, y, eye), (x, y, 0), up)
        _, _, _, buffer, _ = p.getCameraImage(
            self._spec.width,
            self._spec.height,
            view,
            self._projection,
            shadow=0,
            renderer=p.ER_TINY_RENDERER,
            flags=p.ER_NO_SEGMENTATION_MASK,
            physicsClientId=self._client,
        )
        buffer = np.reshape(np.asarray(buffer, np.float32), self._spec.shape)
        depth = metres_of(buffer, NEAR_M, FAR_M) - np.float32(STAND_OFF_M)
        if self._spec.handedness < 0:
            depth = depth[:, ::-1]
        return np.clip(depth, self._spec.depth_min_m, self._spec.depth_max_m)


class Spectator:
    """Renders the scene for people, in a physics client of its own: looking never changes what the robot sees."""

    def __init__(self, build: Callable[[int], object]) -> None:
        self._client = p.connect(p.DIRECT)
        build(self._client)
        self._view = p.computeViewMatrix((1.15, -0.62, 0.72), (0.45, 0.0, 0.12), (0, 0, 1))
        self._projection = p.computeProjectionMatrixFOV(45, 4 / 3, 0.05, 4.0)

    def look(self, source: int) -> NDArray[np.uint8]:
        """uint8 [480, 640, 3] of the scene whose state client `source` holds; bodies correspond by id."""
        for body in range(p.getNumBodies(physicsClientId=source)):
            position, orientation = p.getBasePositionAndOrientation(body, physicsClientId=source)
            p.resetBasePositionAndOrientation(body, position, orientation, physicsClientId=self._client)
            for joint in range(p.getNumJoints(body, physicsClientId=source)):
                angle = p.getJointState(body, joint, physicsClientId=source)[0]
                p.resetJointState(body, joint, angle, physicsClientId=self._client)
        image = p.getCameraImage(640, 480, self._view, self._projection, physicsClientId=self._client)[2]
        return np.reshape(np.asarray(image, np.uint8), (480, 640, 4))[..., :3]

    def close(self) -> None:
        p.disconnect(self._client)
