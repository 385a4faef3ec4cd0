"""Block in bowl: take the block and let it go in the bowl."""

import math

import numpy as np
from numpy.typing import NDArray

from protos.spaces import Pose
from sim_client import objects
from sim_client.arm import Arm
from sim_client.objects import Traits
from sim_client.tasks.block_picking import SIDE_M, WRIST_SPREAD_RAD
from sim_client.tasks.placing import Point, in_disc, start_pose, until
from sim_client.tasks.skills import carry, grasp, holds, retreat

BOWL_RADIUS_M, BOWL_HEIGHT_M = 0.065, 0.04
SPREAD_M = 0.12
APART_M = 0.135
"""Between the centres of block and bowl: an open finger fits between."""
CARRY_M = 0.14
OVER_M = 0.012
"""The block may be let go this far from above the bowl's middle."""


class BlockInBowl:
    """Implements `sim_client.tasks.Task`."""

    def __init__(self, client: int, traits: Traits) -> None:
        self._size = traits.size
        self._block = objects.block(client, SIDE_M, traits)
        self._bowl = objects.bowl(client, BOWL_RADIUS_M, BOWL_HEIGHT_M, traits)
        self.orientation = 0.0

    def reset(self, rng: np.random.Generator, turn: float) -> Pose:
        def draw() -> tuple[Point, Point]:
            return in_disc(rng, SPREAD_M, turn), in_disc(rng, SPREAD_M, turn)

        block, bowl = until(draw, lambda xy: bool(np.linalg.norm(xy[0] - xy[1]) >= APART_M * self._size))
        yaw = rng.uniform(-math.pi, math.pi) + turn
        self._block.place(block, yaw)
        self._bowl.place(bowl, yaw)
        self.orientation = math.atan2(bowl[1] - block[1], bowl[0] - block[0])
        return start_pose(rng, turn, yaw, WRIST_SPREAD_RAD)

    def succeeded(self, arm: Arm) -> bool:
        return self._in_bowl and not arm.holding and self._block.settled and self._bowl.settled

    def expert(self, arm: Arm) -> NDArray[np.float32]:
        if holds(arm, self._block.position, SIDE_M * self._size):
            release_m = (BOWL_HEIGHT_M / 2 + SIDE_M / 2) * self._size
            return carry(arm, self._bowl.xy, release_m, CARRY_M, near_m=OVER_M)
        if self._in_bowl:
            return retreat(arm)
        return grasp(arm, self._block.position, self._block.yaw, math.pi / 2)

    def footprints(self) -> list[tuple[Point, float]]:
        return [(self._block.xy, SIDE_M * self._size), (self._bowl.xy, BOWL_RADIUS_M * self._size)]

    @property
    def _in_bowl(self) -> bool:
        inside = np.linalg.norm(self._block.xy - self._bowl.xy) < BOWL_RADIUS_M * self._size
        low = self._block.position[2] < (BOWL_HEIGHT_M + SIDE_M / 2) * self._size
        return bool(inside and low and self._bowl.upright)
