"""The tasks. One file is one task: its scene, its success and its expert."""

from typing import Protocol

import numpy as np

from protos.spaces import Pose
from sim_client.arm import Arm
from sim_client.tasks.drawer_opening import DrawerOpening


class Task(Protocol):
    """What an environment asks of a task. All poses are in the robot's base frame, metres and radians."""

    def __init__(self, client: int) -> None:
        """Load the task's bodies into a physics client."""

    def reset(self, rng: np.random.Generator, turn: float) -> Pose:
        """Place everything, then turn the scene by `turn` about the workspace's centre; returns the tool's start."""

    def succeeded(self) -> bool:
        """Judged on the state at the end of a control step."""

    def expert(self, arm: Arm) -> np.ndarray:
        """The scripted expert's action for the present state: float32 in the order of protos.spaces.ACTION."""


TASKS: dict[str, type[Task]] = {"drawer_opening": DrawerOpening}
