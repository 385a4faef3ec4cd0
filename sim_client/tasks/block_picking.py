"""Block picking: a block lies anywhere; take it and hold it up. The easiest task, for tutorials."""

import math

import numpy as np
from numpy.typing import NDArray

from protos.spaces import Pose
from sim_client import objects
from sim_client.arm import Arm
from sim_client.objects import Traits
from sim_client.tasks.placing import in_disc, start_pose
from sim_client.tasks.skills import act, grasp, holds

SIDE_M = 0.045
SPREAD_M = 0.11
HELD_AT_M = 0.12
"""The block's centre must hang still at least this high."""
WRIST_SPREAD_RAD = math.pi / 6  # a cube's grasps repeat every quarter turn; half-way between two, neither is better


class BlockPicking:
    """Implements `sim_client.tasks.Task`."""

    def __init__(self, client: int, traits: Traits) -> None:
        self._side = SIDE_M * traits.size
        self._block = objects.block(client, SIDE_M, traits)
        self.orientation = 0.0

    def reset(self, rng: np.random.Generator, turn: float) -> Pose:
        self.orientation = rng.uniform(-math.pi, math.pi) + turn
        xy = in_disc(rng, SPREAD_M, turn)
        self._block.place(xy, self.orientation)
        return start_pose(rng, turn, self.orientation, WRIST_SPREAD_RAD)

    def succeeded(self, arm: Arm) -> bool:
        return self._held(arm) and self._block.position[2] >= HELD_AT_M and self._block.settled

    def expert(self, arm: Arm) -> NDArray[np.float32]:
        if self._held(arm):
            return act(opening=0.0, lift=HELD_AT_M + 0.02 - arm.tool_pose().z)
        return grasp(arm, self._block.position, self._block.yaw, math.pi / 2)

    def footprints(self) -> list[tuple[NDArray[np.float64], float]]:
        return [(self._block.xy, self._side)]

    def _held(self, arm: Arm) -> bool:
        return holds(arm, self._block.position, self._side)
