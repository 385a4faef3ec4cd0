"""Block pushing: shove the block against the middle of a bumper. It must lie there, not hang.

In its twin block_pushing_tilted the table leans, by `strength`: gravity then has a direction in the plane, which no
turn of the scene turns.
"""

import math

import numpy as np
import pybullet as p
from numpy.typing import NDArray

from protos.spaces import Pose
from sim_client import objects
from sim_client.arm import Arm
from sim_client.objects import GRAVITY_M_S2, Traits
from sim_client.tasks.placing import Point, direction, in_disc, start_pose
from sim_client.tasks.skills import HOVER_M, NEAR_RAD, act, turn_to

SIDE_M = 0.06
BUMPER_M = (0.12, 0.02, 0.03)
"""Length, depth, height."""
SPREAD_M = 0.035
AWAY_M, ASIDE_M, ASKEW_RAD = (0.05, 0.10), 0.03, math.pi / 9
"""Where the block starts: before its goal, to the side of it, turned from flush."""
GOAL_M = 0.02
"""The block's middle must come to rest this close to the goal."""
STANDS_M = 0.005
"""And its centre this close to its height on the table: held in the air over its goal, it has not been pushed there."""
WRIST_SPREAD_RAD = math.pi / 3
FULL_TILT_RAD = math.radians(20)

PUSH_Z_M = 0.025
FINGER_HALF_M = 0.0105  # of a closed finger along the tool's x axis, which points where it pushes
CLEAR_M = 0.022
"""Between block and fingers where they come down."""
LINED_UP_M = 0.006


class BlockPushing:
    """Implements `sim_client.tasks.Task`."""

    def __init__(self, client: int, traits: Traits, strength: float = 0.0) -> None:
        self._half = SIDE_M * traits.size / 2
        self._block = objects.block(client, SIDE_M, traits)
        self._bumper = objects.bumper(client, *BUMPER_M, traits=traits)
        self._to_goal = BUMPER_M[1] * traits.size / 2 + self._half
        tilt = strength * FULL_TILT_RAD  # down is towards the robot's right
        down = (0.0, -GRAVITY_M_S2 * math.sin(tilt), -GRAVITY_M_S2 * math.cos(tilt))
        p.setGravity(*down, physicsClientId=client)
        self.orientation = 0.0

    def reset(self, rng: np.random.Generator, turn: float) -> Pose:
        self.orientation = rng.uniform(-math.pi, math.pi) + turn
        out = direction(self.orientation)
        away, aside = rng.uniform(*AWAY_M), rng.uniform(-ASIDE_M, ASIDE_M)
        middle = in_disc(rng, SPREAD_M, turn)
        goal = middle - away / 2 * out
        self._bumper.place(goal - self._to_goal * out, self.orientation)
        self._block.place(
            goal + away * out + aside * direction(self.orientation + math.pi / 2),
            self.orientation + rng.uniform(-ASKEW_RAD, ASKEW_RAD),
        )
        return start_pose(rng, turn, self._push_yaw, WRIST_SPREAD_RAD)

    def succeeded(self, arm: Arm) -> bool:
        there = bool(np.linalg.norm(self._goal - self._block.xy) < GOAL_M)
        stands = abs(self._block.position[2] - self._half) < STANDS_M
        return there and stands and self._block.settled and not arm.holding

    def expert(self, arm: Arm) -> NDArray[np.float32]:
        """Behind the block, seen from the goal; down; push, sideways slips corrected on the way."""
        tool, to_goal = arm.tool_pose(), self._goal - self._block.xy
        distance = float(np.linalg.norm(to_goal))
        ahead = to_goal / max(distance, 1e-6)
        aside = np.array([-ahead[1], ahead[0]])
        from_block = np.array([tool.x, tool.y]) - self._block.xy
        behind, slip = float(-from_block @ ahead), float(from_block @ aside)
        turn = turn_to(tool.yaw, self._push_yaw, math.pi)
        contact = self._half + FINGER_HALF_M
        down = tool.z < PUSH_Z_M + 0.01
        if down and behind > contact - 0.01 and abs(slip) < 3 * LINED_UP_M:
            return act(opening=0.0, planar=(behind - contact + distance) * ahead - slip * aside, yaw=turn)
        at = self._block.xy - (contact + CLEAR_M) * ahead
        to_start = at - (tool.x, tool.y)
        lined_up = bool(np.linalg.norm(to_start) < LINED_UP_M) and abs(turn) < NEAR_RAD
        if down and not lined_up:
            return act(opening=0.0, lift=HOVER_M - tool.z)
        return act(opening=0.0, planar=to_start, lift=(PUSH_Z_M if lined_up else HOVER_M) - tool.z, yaw=turn)

    def footprints(self) -> list[tuple[Point, float]]:
        return [(self._block.xy, 3 * self._half), (self._bumper.xy, BUMPER_M[0] / 2), (self._goal, self._half)]

    @property
    def _goal(self) -> Point:
        return self._bumper.xy + self._to_goal * direction(self.orientation)

    @property
    def _push_yaw(self) -> float:
        """The fingers stand abreast of the push: their y axis lies across it."""
        to_goal = self._goal - self._block.xy
        return math.atan2(to_goal[1], to_goal[0])
