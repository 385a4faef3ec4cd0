"""Drawer opening: a cabinet stands anywhere, turned any way; take its handle and pull.

In its twin drawer_opening_fixed_side the cabinet no longer stands every way round, the less the greater `strength`; at
1 its drawer always opens towards +x.
"""

import math
from pathlib import Path

import numpy as np
import pybullet as p
from numpy.typing import NDArray

from protos.spaces import Pose
from sim_client.arm import Arm
from sim_client.objects import Traits
from sim_client.tasks.placing import Point, direction, in_disc, start_pose
from sim_client.tasks.skills import LIMIT, LOW_M, act, grasp

ASSET = Path(__file__).parent.parent / "assets" / "drawer.urdf"
HANDLE_OUT_M, HANDLE_UP_M = 0.1, 0.045  # where to take the fin, from the cabinet's base, as in the URDF
OPEN_ENOUGH_M = 0.09
"""The drawer counts as open from here; its slide is 0.11 long."""
SETTLED_M_S = 0.05
SLIDE_FRICTION_N = 2.0
HANDLE_FRICTION = 0.4

SPREAD_M = 0.09
"""The middle of the pull lies within this radius of the workspace's centre: as hard from every side."""
WRIST_SPREAD_RAD = math.pi / 3  # the next grasp is half a turn away
SLIPPED_M = 0.02
"""While the fingers are this close to where they took it, they still have it."""


class DrawerOpening:
    """A cabinet with one drawer on the table. Implements `sim_client.tasks.Task`."""

    def __init__(self, client: int, traits: Traits, strength: float = 0.0) -> None:
        self._client, self._size = client, traits.size
        self._circle = 1.0 - strength
        self._open_enough_m = OPEN_ENOUGH_M * traits.size
        self._body = p.loadURDF(str(ASSET), useFixedBase=True, globalScaling=traits.size, physicsClientId=client)
        p.setJointMotorControl2(
            self._body, 0, p.VELOCITY_CONTROL, targetVelocity=0, force=SLIDE_FRICTION_N * traits.friction,
            physicsClientId=client,
        )  # fmt: skip
        tray_kg = p.getDynamicsInfo(self._body, 0, physicsClientId=client)[0]
        p.changeDynamics(
            self._body, 0, lateralFriction=HANDLE_FRICTION * traits.friction, mass=tray_kg * traits.mass,
            physicsClientId=client,
        )  # fmt: skip
        self._centre: Point = np.zeros(2)
        self.orientation = 0.0

    def reset(self, rng: np.random.Generator, turn: float) -> Pose:
        self.orientation = rng.uniform(-math.pi, math.pi) * self._circle + turn
        middle = in_disc(rng, SPREAD_M, turn)
        self._centre = middle - (self._handle_out_m + self._open_enough_m / 2) * self._outward
        turned = p.getQuaternionFromEuler((0, 0, self.orientation))
        p.resetBasePositionAndOrientation(self._body, (*self._centre, 0), turned, physicsClientId=self._client)
        p.resetJointState(self._body, 0, 0.0, physicsClientId=self._client)
        return start_pose(rng, turn, self.orientation, WRIST_SPREAD_RAD)

    def succeeded(self, arm: Arm) -> bool:
        opened, speed = self._slide
        return opened >= self._open_enough_m and abs(speed) < SETTLED_M_S

    def expert(self, arm: Arm) -> NDArray[np.float32]:
        """Take the fin, a finger on either side of it, and pull."""
        tool, handle_up = arm.tool_pose(), HANDLE_UP_M * self._size
        has = np.linalg.norm(self._handle - (tool.x, tool.y)) < SLIPPED_M
        if arm.holding and has and tool.z < handle_up + LOW_M:
            return act(opening=0.0, planar=LIMIT["planar"] * self._outward)
        return grasp(arm, np.array([*self._handle, handle_up]), self.orientation, math.pi)

    def footprints(self) -> list[tuple[Point, float]]:
        return [(self._centre, 0.11 * self._size), (self._centre + 0.2 * self._outward, 0.13)]

    @property
    def _outward(self) -> Point:
        return direction(self.orientation)

    @property
    def _handle_out_m(self) -> float:
        return HANDLE_OUT_M * self._size

    @property
    def _handle(self) -> Point:
        return self._centre + (self._handle_out_m + self._slide[0]) * self._outward

    @property
    def _slide(self) -> tuple[float, float]:
        """How far the drawer is open, and how fast it moves: m, m/s."""
        return p.getJointState(self._body, 0, physicsClientId=self._client)[:2]
