"""Where an episode's things start: every distribution here is the same from every side of the table."""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from protos.spaces import Pose
from sim_client.arm import WORKSPACE_CENTRE, YAW_CENTRE_RAD

Point = NDArray[np.float64]
"""[2] x and y, metres, robot's base frame."""
START_LOW_M, START_HIGH_M = 0.17, 0.25
START_SPREAD_M = 0.06
T = TypeVar("T")


def in_disc(rng: np.random.Generator, radius: float, turn: float) -> Point:
    """Uniform in a disc of `radius` metres about the workspace's centre, turned about it."""
    r, angle = radius * math.sqrt(rng.uniform()), rng.uniform(-math.pi, math.pi) + turn
    return np.array(WORKSPACE_CENTRE) + r * direction(angle)


def direction(angle: float) -> Point:
    """The unit vector at `angle` to +x."""
    return np.array([math.cos(angle), math.sin(angle)])


def until(draw: Callable[[], T], good: Callable[[T], bool], tries: int = 1000) -> T:
    """Draw until `good`. Raises RuntimeError when nothing is, which a task's sizes must not allow."""
    for _ in range(tries):
        drawn = draw()
        if good(drawn):
            return drawn
    raise RuntimeError(f"no placement in {tries} tries")


def start_pose(rng: np.random.Generator, turn: float, grasp_yaw: float, spread_rad: float) -> Pose:
    """Where the tool starts: above the table, its wrist within `spread_rad` of `grasp_yaw`.

    Half-way between two grasps both ways round are right and no demonstration says which; a task keeps
    `spread_rad` clear of that. Of the wrist's half turns, which no image shows, it takes the one that keeps the joint
    limit out of the way.
    """
    x, y = in_disc(rng, START_SPREAD_M, turn)
    z = rng.uniform(START_LOW_M, START_HIGH_M)
    offset = rng.uniform(-spread_rad, spread_rad)
    middle = grasp_yaw + offset / 2
    return Pose(x, y, z, grasp_yaw + offset - math.pi * round((middle - YAW_CENTRE_RAD) / math.pi))
