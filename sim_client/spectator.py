"""The scene as people see it: colours, meshes, light, from beside the table."""

from collections.abc import Callable

import numpy as np
import pybullet as p
from numpy.typing import NDArray


class Spectator:
    """Renders the scene for people, in a physics client of its own: looking never changes what the robot sees."""

    def __init__(self, build: Callable[[int], object]) -> None:
        self._client = p.connect(p.DIRECT)
        build(self._client)
        self._view = p.computeViewMatrix((1.15, -0.62, 0.72), (0.45, 0.0, 0.12), (0, 0, 1))
        self._projection = p.computeProjectionMatrixFOV(45, 4 / 3, 0.05, 4.0)

    def look(self, source: int) -> NDArray[np.uint8]:
        """uint8 [480, 640, 3] of the scene whose state client `source` holds; bodies correspond by their order."""
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
