"""The robot: a Franka Panda that takes one tool-frame motion per control step and reports where it is."""

import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pybullet as p
import pybullet_data

from protos.spaces import Pose

PHYSICS_HZ = 240
CONTROL_PERIOD_S = 0.4
"""One control step. Long enough for a quarter of pi within the wrist's 2.61 rad/s."""
_SUBSTEPS = round(CONTROL_PERIOD_S * PHYSICS_HZ)
_RAMP = round(0.8 * _SUBSTEPS)  # the rest of the step lets the arm settle
_SUBSTEPS_PER_WAYPOINT = 4

WORKSPACE_CENTRE = (0.5, 0.0)
"""Of the 0.3 m x 0.3 m workspace in front of the robot, metres in the base frame."""
WORKSPACE_HALF_M = 0.15
TOOL_LOW_M, TOOL_HIGH_M = 0.02, 0.30
YAW_CENTRE_RAD = math.pi / 4
"""Where the last joint is in the middle of its travel."""
YAW_REACH_RAD = 2.4
"""Allowed turn to either side of the centre; joint 7 reaches 2.9, of which the first joint's swing may take 0.3."""

FINGER_TRAVEL_M = 0.04
HOLDING_MIN_M = 0.003
"""A closed gripper whose fingers stay further apart than this holds something."""

_ARM_JOINTS = list(range(7))
_FINGERS = [9, 10]
_TOOL = 11
_HOME = (0.0, -0.22, 0.0, -2.55, 0.0, 2.33, math.pi / 4)
_FORCES = [87.0] * 4 + [12.0] * 3
_LOWER = (-2.9, -1.76, -2.9, -3.07, -2.9, -0.02, -2.9)
_UPPER = (2.9, 1.76, 2.9, -0.07, 2.9, 3.75, 2.9)
_GRIP_FORCE_N = 20.0

_FINGER_BOX = '<visual><origin xyz="0 {y} 0.027"/><geometry><box size="0.021 0.016 0.054"/></geometry></visual>'
# A link without any visual is drawn by its collision mesh, so an invisible one gets a speck.
_SPECK = '<visual><geometry><box size="1e-6 1e-6 1e-6"/></geometry></visual>'


class Arm:
    """A Panda in the physics client `client`.

    The meshes that one looks at are left out unless `meshes`: the observation camera sees the fingers alone, drawn
    as boxes, so the arm does not cover the scene and a frame costs a sixth.
    """

    def __init__(self, client: int, *, meshes: bool = False) -> None:
        self._client = client
        self._body = _load(client, meshes)
        # Real Panda fingers are coupled; the URDF's mimic tag is ignored by PyBullet, a gear holds them together.
        gear = p.createConstraint(
            self._body, _FINGERS[0], self._body, _FINGERS[1], p.JOINT_GEAR, (1, 0, 0), (0, 0, 0), (0, 0, 0),
            physicsClientId=client,
        )  # fmt: skip
        p.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50, physicsClientId=client)
        for finger in _FINGERS:
            p.changeDynamics(self._body, finger, lateralFriction=1.0, spinningFriction=0.1, physicsClientId=client)
        self._yaw = 0.0  # unwrapped
        self._open = 1.0

    def reset(self, pose: Pose) -> None:
        """Stand still at `pose` with an open gripper; nothing is simulated."""
        self._place(_HOME)
        self._yaw, self._open = pose.yaw, 1.0
        for _ in range(20):  # each solve starts from the joints of the last
            joints = self._solve(pose)
            self._place(joints)
        for joint, target in zip(_FINGERS, (FINGER_TRAVEL_M, FINGER_TRAVEL_M), strict=True):
            p.resetJointState(self._body, joint, target, physicsClientId=self._client)
        self._command(joints)

    def move(self, delta_xyz: np.ndarray, delta_yaw: float, opening: float) -> None:
        """Move the tool by `delta_xyz` (metres) and `delta_yaw` (radians) and the fingers to `opening` (0 closed, 1
        open) during one control step. The target is kept inside the workspace."""
        here = self.tool_pose()
        low = np.array([c - WORKSPACE_HALF_M for c in WORKSPACE_CENTRE] + [TOOL_LOW_M])
        high = np.array([c + WORKSPACE_HALF_M for c in WORKSPACE_CENTRE] + [TOOL_HIGH_M])
        x, y, z = np.clip(np.array([here.x, here.y, here.z]) + delta_xyz, low, high)
        yaw = float(np.clip(here.yaw + delta_yaw, YAW_CENTRE_RAD - YAW_REACH_RAD, YAW_CENTRE_RAD + YAW_REACH_RAD))
        self._open = opening
        start = self._joints()
        goal = np.array(self._solve(Pose(x, y, z, yaw)))
        for substep in range(_SUBSTEPS):
            if substep % _SUBSTEPS_PER_WAYPOINT == 0:
                done = min(1.0, (substep + _SUBSTEPS_PER_WAYPOINT) / _RAMP)
                self._command(start + done * (goal - start))
            p.stepSimulation(physicsClientId=self._client)

    def tool_pose(self) -> Pose:
        """Where the tool centre, between the finger tips, is. The yaw is unwrapped: it counts the wrist's turns."""
        state = p.getLinkState(self._body, _TOOL, computeForwardKinematics=True, physicsClientId=self._client)
        (x, y, z), quaternion = state[4], state[5]
        rotation = p.getMatrixFromQuaternion(quaternion)
        wrapped = math.atan2(rotation[3], rotation[0])
        self._yaw += math.remainder(wrapped - self._yaw, 2 * math.pi)
        return Pose(x, y, z, self._yaw)

    @property
    def finger_gap_m(self) -> float:
        """Distance between the finger pads."""
        states = p.getJointStates(self._body, _FINGERS, physicsClientId=self._client)
        return states[0][0] + states[1][0]

    @property
    def holding(self) -> bool:
        """Whether the gripper was told to close and something keeps its fingers apart."""
        return self._open < 0.5 and self.finger_gap_m > HOLDING_MIN_M

    def _joints(self) -> np.ndarray:
        return np.array([s[0] for s in p.getJointStates(self._body, _ARM_JOINTS, physicsClientId=self._client)])

    def _place(self, joints: tuple[float, ...] | list[float]) -> None:
        for joint, position in zip(_ARM_JOINTS, joints, strict=True):
            p.resetJointState(self._body, joint, position, physicsClientId=self._client)

    def _solve(self, pose: Pose) -> list[float]:
        """Arm joints that put the tool at `pose`, pointing down; starts from where the joints are."""
        solution = p.calculateInverseKinematics(
            self._body,
            _TOOL,
            (pose.x, pose.y, pose.z),
            p.getQuaternionFromEuler((math.pi, 0.0, pose.yaw)),
            lowerLimits=_LOWER,
            upperLimits=_UPPER,
            jointRanges=[u - l for l, u in zip(_LOWER, _UPPER, strict=True)],  # noqa: E741
            restPoses=_HOME,
            maxNumIterations=60,
            residualThreshold=1e-5,
            physicsClientId=self._client,
        )
        return list(solution[:7])

    def _command(self, joints: np.ndarray | list[float]) -> None:
        p.setJointMotorControlArray(
            self._body,
            _ARM_JOINTS,
            p.POSITION_CONTROL,
            targetPositions=list(joints),
            forces=_FORCES,
            positionGains=[0.3] * 7,
            physicsClientId=self._client,
        )
        p.setJointMotorControlArray(
            self._body,
            _FINGERS,
            p.POSITION_CONTROL,
            targetPositions=[self._open * FINGER_TRAVEL_M] * 2,
            forces=[_GRIP_FORCE_N] * 2,
            positionGains=[0.1] * 2,
            physicsClientId=self._client,
        )


def _load(client: int, meshes: bool) -> int:
    """The Panda of pybullet_data; without `meshes`, its visual meshes give way to one box per finger."""
    source = Path(pybullet_data.getDataPath()) / "franka_panda" / "panda.urdf"
    if meshes:
        return p.loadURDF(str(source), useFixedBase=True, physicsClientId=client)
    urdf = re.sub(r"<visual>.*?</visual>", _SPECK, source.read_text(), flags=re.DOTALL)
    for finger, y in (("left", 0.008), ("right", -0.008)):
        start = urdf.index(_SPECK, urdf.index(f'<link name="panda_{finger}finger">'))
        urdf = urdf[:start] + _FINGER_BOX.format(y=y) + urdf[start + len(_SPECK) :]
    urdf = urdf.replace("package://meshes", str(source.parent / "meshes"))
    with tempfile.NamedTemporaryFile("w", suffix=".urdf") as file:
        file.write(urdf)
        file.flush()
        return p.loadURDF(file.name, useFixedBase=True, physicsClientId=client)
