"""What the scripted experts are made of. Each is a function of the present state alone, as a policy is."""

import math

import numpy as np
from numpy.typing import NDArray

from protos.spaces import ACTION
from sim_client.arm import YAW_CENTRE_RAD, YAW_REACH_RAD, Arm
from sim_client.robots import FINGER_TRAVEL_M
from sim_client.tasks.placing import Point

HOVER_M = 0.125
"""The tool travels at this height while the fingers are open."""
NEAR_M, NEAR_RAD, LOW_M = 0.006, 0.06, 0.012
"""Aligned, and down: closer than this."""
LIMIT = {field.name: field.scale for field in ACTION.fields}


def act(
    *, opening: float, planar: Point | tuple[float, float] = (0.0, 0.0), lift: float = 0.0, yaw: float = 0.0
) -> NDArray[np.float32]:
    """The contract's action nearest to the wanted motion (metres, radians); `opening` 0 closed, 1 open."""
    values = {"gripper": opening, "planar": planar, "lift": lift, "yaw": yaw}
    return ACTION.project(np.concatenate([np.atleast_1d(values[f.name]) for f in ACTION.fields]).astype(np.float32))


def turn_to(tool_yaw: float, yaw: float, period: float) -> float:
    """The shortest turn to `yaw` modulo `period` that the wrist can make, radians."""
    turn = math.remainder(yaw - tool_yaw, period)
    beyond = abs(tool_yaw + turn - YAW_CENTRE_RAD) > YAW_REACH_RAD
    return turn - math.copysign(period, tool_yaw - YAW_CENTRE_RAD) if beyond else turn


def grasp(arm: Arm, xyz: NDArray[np.float64], yaw: float, period: float) -> NDArray[np.float32]:
    """Hover over `xyz` with open fingers, the wrist at `yaw` modulo `period`; come down; close.

    The fingers move along the tool's y axis, which lies along `yaw` + pi/2.
    """
    tool, z = arm.tool_pose(), float(xyz[2])
    to_grasp = xyz[:2] - (tool.x, tool.y)
    turn = turn_to(tool.yaw, yaw, period)
    aligned = bool(np.linalg.norm(to_grasp) < NEAR_M) and abs(turn) < NEAR_RAD
    missed = arm.finger_gap_m < FINGER_TRAVEL_M and not arm.holding
    if aligned and tool.z < z + LOW_M and not missed:
        return act(opening=0.0)
    return act(opening=1.0, planar=to_grasp, lift=(z if aligned else HOVER_M) - tool.z, yaw=turn)


def carry(
    arm: Arm, xy: Point, z: float, above: float, turn: float = 0.0, *, near_m: float, low_m: float = LOW_M / 2
) -> NDArray[np.float32]:
    """Take what the gripper holds up to `above`, over `xy`, down to `z`, and let go."""
    tool = arm.tool_pose()
    to_goal = xy - (tool.x, tool.y)
    there = bool(np.linalg.norm(to_goal) < near_m) and abs(turn) < NEAR_RAD
    if there and tool.z < z + low_m:
        return act(opening=1.0)
    if there:
        return act(opening=0.0, planar=to_goal, lift=z - tool.z, yaw=turn)
    if tool.z < above - LOW_M:  # straight up first, whatever stands around
        return act(opening=0.0, lift=above - tool.z)
    return act(opening=0.0, planar=to_goal, lift=above - tool.z, yaw=turn)


def retreat(arm: Arm) -> NDArray[np.float32]:
    """Open and rise."""
    return act(opening=1.0, lift=HOVER_M - arm.tool_pose().z)


def holds(arm: Arm, xyz: NDArray[np.float64], reach_m: float) -> bool:
    """Whether the gripper holds what is at `xyz`."""
    tool = arm.tool_pose()
    return arm.holding and bool(np.linalg.norm(xyz - (tool.x, tool.y, tool.z)) < reach_m)
