"""Block stacking: put either of two blocks on the other."""

import math

import numpy as np
from numpy.typing import NDArray

from protos.spaces import Pose
from sim_client import objects
from sim_client.arm import Arm
from sim_client.objects import Body, Traits
from sim_client.tasks.block_picking import SIDE_M, WRIST_SPREAD_RAD
from sim_client.tasks.placing import Point, in_disc, start_pose, until
from sim_client.tasks.skills import carry, grasp, holds, retreat, turn_to

SPREAD_M = 0.11
APART_M = 0.10
"""Between the centres: an open finger fits between."""
CLEARLY_NEARER_M = 0.03
"""The tool starts this much nearer to one block: the expert takes the nearer one, and one must see which that is."""
CARRY_M = 0.14
OVER_M = 0.005
HIGHER_BY_M = 0.004
"""Of two stacked blocks the heights differ by a side, within this."""


class BlockStacking:
    """Implements `sim_client.tasks.Task`."""

    def __init__(self, client: int, traits: Traits) -> None:
        self._side = SIDE_M * traits.size
        self._blocks = [objects.block(client, SIDE_M, traits, c) for c in ((0.85, 0.32, 0.2), (0.25, 0.55, 0.35))]
        self.orientation = 0.0

    def reset(self, rng: np.random.Generator, turn: float) -> Pose:
        def draw() -> tuple[list[Point], list[float], Pose]:
            spots = [in_disc(rng, SPREAD_M, turn) for _ in self._blocks]
            yaws = [rng.uniform(-math.pi, math.pi) + turn for _ in self._blocks]
            return spots, yaws, start_pose(rng, turn, yaws[0], WRIST_SPREAD_RAD)

        def good(drawn: tuple[list[Point], list[float], Pose]) -> bool:
            (first, second), _, start = drawn
            near, far = (float(np.linalg.norm(spot - (start.x, start.y))) for spot in (first, second))
            return bool(np.linalg.norm(first - second) >= APART_M) and far - near >= CLEARLY_NEARER_M

        (near, far), yaws, start = until(draw, good)
        for block, spot, yaw in zip(self._blocks, (near, far), yaws, strict=True):
            block.place(spot, yaw)
        self.orientation = math.atan2(far[1] - near[1], far[0] - near[0])
        return start

    def succeeded(self, arm: Arm) -> bool:
        return self._stacked and not arm.holding and all(block.settled for block in self._blocks)

    def expert(self, arm: Arm) -> NDArray[np.float32]:
        held = next((b for b in self._blocks if holds(arm, b.position, 0.6 * self._side)), None)
        if held is not None:
            return self._put(arm, held, next(b for b in self._blocks if b is not held))
        if self._stacked:
            return retreat(arm)
        tool = arm.tool_pose()
        nearest = min(self._blocks, key=lambda b: float(np.linalg.norm(b.xy - (tool.x, tool.y))))
        return grasp(arm, nearest.position, nearest.yaw, math.pi / 2)

    def footprints(self) -> list[tuple[Point, float]]:
        return [(block.xy, self._side) for block in self._blocks]

    def _put(self, arm: Arm, held: Body, under: Body) -> NDArray[np.float32]:
        tool = arm.tool_pose()
        # The tool goes where the *block* comes over the other, wherever between the fingers it is held.
        goal = under.xy - held.xy + (tool.x, tool.y)
        release_m = float(under.position[2] + self._side + tool.z - held.position[2])
        turn = turn_to(tool.yaw, tool.yaw + under.yaw - held.yaw, math.pi / 2)
        return carry(arm, goal, release_m, max(CARRY_M, release_m + self._side), turn, near_m=OVER_M, low_m=0.003)

    @property
    def _stacked(self) -> bool:
        low, high = sorted((block.position for block in self._blocks), key=lambda xyz: float(xyz[2]))
        over = np.linalg.norm(high[:2] - low[:2]) < self._side / 2
        return bool(over and abs(high[2] - low[2] - self._side) < HIGHER_BY_M)
