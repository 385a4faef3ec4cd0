"""What a command may say about the simulated world; collection and evaluation share it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import gymnasium

from sim_client import ENV_IDS, TaskName
from sim_client.env import TabletopEnv, ViewName
from sim_client.randomization import Randomization
from sim_client.robots import ArmName


@dataclass(frozen=True)
class World:
    """The simulated world around a task."""

    arm: ArmName = "panda"
    """Which robot. Both have the same gripper, so a policy trained on one can be tried on the other."""
    view: ViewName = "topdown"
    """The contract's top-down depth view, or a fixed side view, in which the scene's symmetry is only latent."""
    elevation_deg: float = 45.0
    """How steeply the side view's camera looks down, 15 to 90."""
    strength: float | None = None
    """How much the symmetry is broken, 0 to 1, in block_pushing_tilted and drawer_opening_fixed_side; left out, it is 1
    there. No other task has it."""
    randomize: Randomization = field(default_factory=Randomization)

    def __post_init__(self) -> None:
        if self.view == "topdown" and self.elevation_deg != type(self).elevation_deg:
            raise ValueError(
                f"--elevation-deg {self.elevation_deg:g} is the side view's: say --view side, or leave it out"
            )

    def env_kwargs(self) -> dict[str, Any]:
        """What differs from the defaults, as keyword arguments of `TabletopEnv` that JSON can hold."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "randomize"}
        if self.view == "topdown":
            given.pop("elevation_deg")
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        kwargs: dict[str, Any] = {k: v for k, v in given.items() if v != usual[k]}
        random = {
            f.name: getattr(self.randomize, f.name)
            for f in dataclasses.fields(self.randomize)
            if getattr(self.randomize, f.name) != f.default
        }
        return kwargs | ({"randomize": random} if random else {})

    def make(self, task: TaskName, **kwargs: Any) -> "gymnasium.Env[Any, Any]":
        """The environment of `task` in this world. Raises ValueError for a combination that does not exist."""
        return gymnasium.make(ENV_IDS[task], **self.env_kwargs(), **kwargs)


def unwrapped(env: "gymnasium.Env[Any, Any]") -> TabletopEnv:
    """The environment itself, for what Gymnasium's interface does not know: expert, contract."""
    base = env.unwrapped
    assert isinstance(base, TabletopEnv)
    return base
