"""The tasks. One file is one task: its scene, its success and its expert."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from protos.spaces import Pose
from sim_client.arm import Arm
from sim_client.objects import Traits
from sim_client.tasks.block_in_bowl import BlockInBowl
from sim_client.tasks.block_picking import BlockPicking
from sim_client.tasks.block_pushing import BlockPushing
from sim_client.tasks.block_stacking import BlockStacking
from sim_client.tasks.drawer_opening import DrawerOpening
from sim_client.tasks.placing import Point


class Task(Protocol):
    """What an environment asks of a task. All poses are in the robot's base frame, metres and radians.

    Its maker, in `TASKS`, loads the task's bodies into a physics client.
    """

    orientation: float
    """Which way the scene is turned, as long as the episode lasts; uniform over the circle in a symmetric task."""

    def reset(self, rng: np.random.Generator, turn: float) -> Pose:
        """Place everything, then turn the scene by `turn` about the workspace's centre; returns the tool's start."""

    def succeeded(self, arm: Arm) -> bool:
        """Judged on the state at the end of a control step, when things have settled."""

    def expert(self, arm: Arm) -> NDArray[np.float32]:
        """The scripted expert's action for the present state: float32 in the order of protos.spaces.ACTION."""

    def footprints(self) -> list[tuple[Point, float]]:
        """Discs (centre, radius in metres) of the table that the task needs: clutter keeps out of them."""


Maker = Callable[[int, Traits], Task]
"""(physics client, what its objects are like) -> task."""

TASKS: dict[str, Maker] = {
    "drawer_opening": DrawerOpening,
    "block_in_bowl": BlockInBowl,
    "block_stacking": BlockStacking,
    "block_picking": BlockPicking,
    "block_pushing": BlockPushing,
}

TWINS: dict[str, Callable[..., Task]] = {
    "block_pushing_tilted": BlockPushing,
    "drawer_opening_fixed_side": DrawerOpening,
}
"""Tasks whose symmetry is broken, by `strength` from 0, where they are the task they come from, to 1."""


def maker(task: str, strength: float | None = None) -> Maker:
    """How to make `task`. Raises ValueError for an unknown one, and for a `strength` that it has not or that is not
    in 0 to 1."""
    if task in TWINS:
        strength = 1.0 if strength is None else strength
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0, symmetric, and 1, got {strength}")
        return partial(TWINS[task], strength=strength)
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; there are {sorted(TASKS | TWINS)}")
    if strength is not None:
        raise ValueError(f"{task} is symmetric and has no strength; those with one are {sorted(TWINS)}")
    return TASKS[task]
