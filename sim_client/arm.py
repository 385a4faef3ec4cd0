"""The robot: an arm with a gripper that takes one motion per control step and reports where its tool is."""

import math

import numpy as np
import pybullet as p

from protos.spaces import Pose
from sim_client.robots import FINGER_TRAVEL_M, ROBOTS, ArmName, arm_joints, load

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

HOLDING_MIN_M = 0.003
"""A gripper whose fingers stay this much further apart than commanded holds something."""
PRESSED_N = 0.5
"""As does one both of whose fingers are pushed by more than this."""

_GRIP_FORCE_N = 20.0


class Arm:
    """Robot `name` in the physics client `client`.

    The meshes that one looks at are left out unless `meshes`: the observation camera sees the fingers alone, drawn
    as boxes, so the arm does not cover the scene and a frame costs a sixth.
    """

    def __init__(self, client: int, name: ArmName = "panda", *, meshes: bool = False) -> None:
        self._client, self._robot = client, ROBOTS[name]
        self._body, joint_of = load(client, name, meshes=meshes)
        self._joints = arm_joints(self._body, client)
        self._tool = joint_of["panda_grasptarget"]
        self._fingers = [joint_of["panda_leftfinger"], joint_of["panda_rightfinger"]]
        # Real Panda fingers are coupled; the URDF's mimic tag is ignored by PyBullet, a gear holds them together.
        left, right = self._fingers
        gear = p.createConstraint(
            self._body, left, self._body, right, p.JOINT_GEAR, (1, 0, 0), (0, 0, 0), (0, 0, 0), physicsClientId=client
        )
        p.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50, physicsClientId=client)
        for finger in self._fingers:
            p.changeDynamics(self._body, finger, lateralFriction=1.0, spinningFriction=0.1, physicsClientId=client)
        self._yaw = 0.0  # unwrapped
        self._open = 1.0
        self._from = self._to = np.array(self._robot.home)  # joints, of the motion under way
        self._substep = 0  # of that motion

    def reset(self, pose: Pose) -> None:
        """Stand still at `pose` with an open gripper; nothing is simulated."""
        self._place(self._robot.home)
        self._yaw, self._open = pose.yaw, 1.0
        for _ in range(20):  # each solve starts from the joints of the last
            joints = self._solve(pose)
            self._place(joints)
        for joint, target in zip(self._fingers, (FINGER_TRAVEL_M, FINGER_TRAVEL_M), strict=True):
            p.resetJointState(self._body, joint, target, physicsClientId=self._client)
        self._from = self._to = np.array(joints)
        self._command(joints)

    def move(self, delta_xyz: np.ndarray, delta_yaw: float, opening: float, latency_s: float = 0.0) -> None:
        """Move the tool by `delta_xyz` (metres) and `delta_yaw` (radians) and the fingers to `opening` (0 closed, 1
        open) during one control step. The target is kept inside the workspace.

        With latency the last motion goes on that much longer, and this one is so far from its end at the next frame.
        """
        here = self.tool_pose()
        low = np.array([c - WORKSPACE_HALF_M for c in WORKSPACE_CENTRE] + [TOOL_LOW_M])
        high = np.array([c + WORKSPACE_HALF_M for c in WORKSPACE_CENTRE] + [TOOL_HIGH_M])
        x, y, z = np.clip(np.array([here.x, here.y, here.z]) + delta_xyz, low, high)
        yaw = float(np.clip(here.yaw + delta_yaw, YAW_CENTRE_RAD - YAW_REACH_RAD, YAW_CENTRE_RAD + YAW_REACH_RAD))
        late = round(latency_s * PHYSICS_HZ)
        self._go_on(late)
        self._open, self._substep = opening, 0
        self._from, self._to = self._angles(), np.array(self._solve(Pose(x, y, z, yaw)))
        self._go_on(_SUBSTEPS - late)

    def tool_pose(self) -> Pose:
        """Where the tool centre, between the finger tips, is. The yaw is unwrapped: it counts the wrist's turns."""
        state = p.getLinkState(self._body, self._tool, computeForwardKinematics=True, physicsClientId=self._client)
        (x, y, z), quaternion = state[4], state[5]
        rotation = p.getMatrixFromQuaternion(quaternion)
        wrapped = math.atan2(rotation[3], rotation[0])
        self._yaw += math.remainder(wrapped - self._yaw, 2 * math.pi)
        return Pose(x, y, z, self._yaw)

    @property
    def finger_gap_m(self) -> float:
        """Distance between the finger pads."""
        states = p.getJointStates(self._body, self._fingers, physicsClientId=self._client)
        return states[0][0] + states[1][0]

    @property
    def holding(self) -> bool:
        """Whether something keeps the gripper's fingers further apart than it was told to, or is pressed by both."""
        return self.finger_gap_m > 2 * FINGER_TRAVEL_M * self._open + HOLDING_MIN_M or self._presses

    @property
    def _presses(self) -> bool:
        """Whether one body pushes both fingers outward: a command just short of its width hardly moves them apart."""
        left, right = (
            np.array(p.getLinkState(self._body, finger, physicsClientId=self._client)[0]) for finger in self._fingers
        )
        outward = (left - right) / np.linalg.norm(left - right)
        pushing = []
        for finger, way in zip(self._fingers, (outward, -outward), strict=True):
            touching = p.getContactPoints(bodyA=self._body, linkIndexA=finger, physicsClientId=self._client)
            # Of a contact: [2] the other body, [7] the normal towards the finger, [9] the force along it.
            pushing.append({c[2] for c in touching if c[9] * np.dot(c[7], way) > PRESSED_N} - {self._body})
        return bool(pushing[0] & pushing[1])

    def _go_on(self, substeps: int) -> None:
        """With the motion under way, or at its end."""
        for _ in range(substeps):
            if self._substep % _SUBSTEPS_PER_WAYPOINT == 0:
                done = min(1.0, (self._substep + _SUBSTEPS_PER_WAYPOINT) / _RAMP)
                self._command(self._from + done * (self._to - self._from))
            p.stepSimulation(physicsClientId=self._client)
            self._substep += 1

    def _angles(self) -> np.ndarray:
        return np.array([s[0] for s in p.getJointStates(self._body, self._joints, physicsClientId=self._client)])

    def _place(self, joints: tuple[float, ...] | list[float]) -> None:
        for joint, position in zip(self._joints, joints, strict=True):
            p.resetJointState(self._body, joint, position, physicsClientId=self._client)

    def _solve(self, pose: Pose) -> list[float]:
        """Arm joints that put the tool at `pose`, pointing down; starts from where the joints are."""
        solution = p.calculateInverseKinematics(
            self._body,
            self._tool,
            (pose.x, pose.y, pose.z),
            p.getQuaternionFromEuler((math.pi, 0.0, pose.yaw)),
            lowerLimits=self._robot.lower,
            upperLimits=self._robot.upper,
            jointRanges=[u - l for l, u in zip(self._robot.lower, self._robot.upper, strict=True)],  # noqa: E741
            restPoses=self._robot.home,
            maxNumIterations=60,
            residualThreshold=1e-5,
            physicsClientId=self._client,
        )
        return list(solution[:7])

    def _command(self, joints: np.ndarray | list[float]) -> None:
        p.setJointMotorControlArray(
            self._body,
            self._joints,
            p.POSITION_CONTROL,
            targetPositions=list(joints),
            forces=self._robot.forces_nm,
            positionGains=[0.3] * 7,
            physicsClientId=self._client,
        )
        p.setJointMotorControlArray(
            self._body,
            self._fingers,
            p.POSITION_CONTROL,
            targetPositions=[self._open * FINGER_TRAVEL_M] * 2,
            forces=[_GRIP_FORCE_N] * 2,
            positionGains=[0.1] * 2,
            physicsClientId=self._client,
        )
