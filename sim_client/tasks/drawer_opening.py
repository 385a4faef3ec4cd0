"""Drawer opening: a cabinet stands anywhere, turned any way; take its handle and pull."""

import math
from pathlib import Path

import numpy as np
import pybullet as p
from numpy.typing import NDArray

from protos.spaces import ACTION, Pose
from sim_client.arm import FINGER_TRAVEL_M, WORKSPACE_CENTRE, YAW_CENTRE_RAD, Arm

ASSET = Path(__file__).parent.parent / "assets" / "drawer.urdf"
HANDLE_OUT_M, HANDLE_UP_M = 0.136, 0.045  # of the handle bar from the cabinet's base, as in the URDF
OPEN_ENOUGH_M = 0.09
"""The drawer counts as open from here; its slide is 0.11 long."""
SLIDE_FRICTION_N = 2.0

SPREAD_M = 0.09
"""The middle of the pull lies within this radius of the workspace's centre: as hard from every side."""
START_LOW_M, START_HIGH_M = 0.17, 0.25
START_SPREAD_M = 0.06
WRIST_SPREAD_RAD = math.pi / 3
"""The wrist starts within this of a grasp. A quarter turn away, left and right are equally good: nobody's answer is
wrong there, and no demonstration says more than that."""

# The expert. Both fingers pass the bar with the most room when the tool is a centimetre outside it.
GRASP_OUT_M = 0.010
HOVER_M = 0.125
NEAR_M, NEAR_RAD, LOW_M = 0.006, 0.06, 0.012
_LIMIT = {field.name: field.scale for field in ACTION.fields}


class DrawerOpening:
    """A cabinet with one drawer on the table. Implements `sim_client.tasks.Task`."""

    def __init__(self, client: int) -> None:
        self._client = client
        self._body = p.loadURDF(str(ASSET), useFixedBase=True, physicsClientId=client)
        p.setJointMotorControl2(
            self._body, 0, p.VELOCITY_CONTROL, targetVelocity=0, force=SLIDE_FRICTION_N, physicsClientId=client
        )
        p.changeDynamics(self._body, 0, lateralFriction=0.8, physicsClientId=client)
        self._centre: NDArray[np.float64] = np.zeros(2)
        self._yaw = 0.0

    def reset(self, rng: np.random.Generator, turn: float) -> Pose:
        self._yaw = rng.uniform(-math.pi, math.pi) + turn
        middle = _in_disc(rng, SPREAD_M, turn)
        start = _in_disc(rng, START_SPREAD_M, turn)
        height = rng.uniform(START_LOW_M, START_HIGH_M)
        wrist = self._grasp_yaw + rng.uniform(-WRIST_SPREAD_RAD, WRIST_SPREAD_RAD)
        self._centre = middle - (HANDLE_OUT_M + OPEN_ENOUGH_M / 2) * self._outward
        p.resetBasePositionAndOrientation(
            self._body,
            (*self._centre, 0),
            p.getQuaternionFromEuler((0, 0, self._yaw)),
            physicsClientId=self._client,
        )
        p.resetJointState(self._body, 0, 0.0, physicsClientId=self._client)
        return Pose(start[0], start[1], height, self._wound(wrist))

    def succeeded(self) -> bool:
        return self._opened >= OPEN_ENOUGH_M

    def expert(self, arm: Arm) -> np.ndarray:
        """Hover outside the handle with the fingers across it, come down, close, pull."""
        tool = arm.tool_pose()
        handle = self._centre + (HANDLE_OUT_M + self._opened) * self._outward
        to_grasp = handle + GRASP_OUT_M * self._outward - (tool.x, tool.y)
        turn = math.remainder(self._grasp_yaw - tool.yaw, math.pi)  # either finger may be the inner one
        low = tool.z < HANDLE_UP_M + LOW_M
        # Closing draws the bar between the pads, a centimetre inwards of the open grasp.
        if arm.holding and low and np.linalg.norm(to_grasp) < 2 * NEAR_M + GRASP_OUT_M:
            return _action(p=0.0, planar=_LIMIT["planar"] * self._outward)
        aligned = np.linalg.norm(to_grasp) < NEAR_M and abs(turn) < NEAR_RAD
        missed = arm.finger_gap_m < FINGER_TRAVEL_M and not arm.holding
        if aligned and low and not missed:
            return _action(p=0.0)
        goal_z = HANDLE_UP_M if aligned else HOVER_M
        return _action(p=1.0, planar=to_grasp, lift=goal_z - tool.z, yaw=turn)

    @property
    def _outward(self) -> np.ndarray:
        return np.array([math.cos(self._yaw), math.sin(self._yaw)])

    @property
    def _opened(self) -> float:
        return p.getJointState(self._body, 0, physicsClientId=self._client)[0]

    @property
    def _grasp_yaw(self) -> float:
        """The fingers move along the tool's y axis; they close across the bar when that lies along the slide."""
        return self._yaw + math.pi / 2

    def _wound(self, wrist: float) -> float:
        """`wrist` plus the number of half turns, which no image shows, that keeps the joint limit out of the way."""
        middle = wrist + math.remainder(self._grasp_yaw - wrist, math.pi) / 2
        return wrist - math.pi * round((middle - YAW_CENTRE_RAD) / math.pi)


def _in_disc(rng: np.random.Generator, radius: float, turn: float) -> np.ndarray:
    """Uniform in a disc about the workspace's centre, turned about it."""
    r, angle = radius * math.sqrt(rng.uniform()), rng.uniform(-math.pi, math.pi) + turn
    return np.array(WORKSPACE_CENTRE) + r * np.array([math.cos(angle), math.sin(angle)])


def _action(
    *, p: float, planar: np.ndarray | tuple[float, float] = (0.0, 0.0), lift: float = 0.0, yaw: float = 0.0
) -> np.ndarray:
    values = {"gripper": p, "planar": planar, "lift": lift, "yaw": yaw}
    return ACTION.project(np.concatenate([np.atleast_1d(values[f.name]) for f in ACTION.fields]).astype(np.float32))
