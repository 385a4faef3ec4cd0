"""The closed loop around a policy that is still in training: `python -m training.evaluate SNAPSHOT`.

The one module here that meets the simulator; `training.evaluations` starts it in a process of its own.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

import sim_client  # noqa: F401  (registers the tasks)
from protos.errors import Rejected
from protos.files import write_atomically
from protos.spaces import PolicySpec
from sim_client.rollout import rollout
from sim_client.seeds import WATCHED
from training.config import recorded
from training.evaluations import Result
from training.export import Graph
from training.loop import make_agent, saved

BELOW_TRAINING = 10
"""Niceness: training keeps the pace that it has alone, as far as there are cores."""


@dataclass(frozen=True)
class Evaluate:
    """Play the task of a snapshot that `training.run --eval-every` left, and write the result beside it."""

    snapshot: Annotated[Path, tyro.conf.Positional]
    """OUTPUT/evaluations/update-N.pt of a run."""
    episodes: int = 50
    """How many."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes must be at least 1, got {self.episodes}")


def evaluate(config: Evaluate) -> Result:
    """Roll the greedy policy out, in the world that its data were recorded in, on one thread."""
    torch.set_num_threads(1)
    expected, remedy = "OUTPUT/evaluations/update-N.pt of a run", "name such a file"
    state = saved(config.snapshot, expected, remedy, torch.device("cpu"))
    try:
        spec = PolicySpec.from_json(state["spec"])
        agent = make_agent(recorded(config.snapshot.resolve().parent.parent), spec)
        agent.load_state_dict(state["agent"])
    except (Rejected, RuntimeError, KeyError) as error:
        got = str(error) if isinstance(error, Rejected) else repr(error)[:200]
        raise Rejected(str(config.snapshot), expected, got, remedy) from error
    graph = Graph(agent, spec).eval()

    @torch.no_grad()
    def act(obs: dict[str, NDArray[np.float32]], info: dict[str, Any]) -> NDArray[np.float32]:
        action = graph(torch.from_numpy(obs["depth"])[None, None], torch.from_numpy(obs["gripper"])[None])[0]
        return np.asarray(spec.action.project(action[0].numpy()), np.float32)

    env = gymnasium.make(EnvSpec.from_json(state["env_spec"]))
    wins = sum(rollout(env, act, WATCHED + index).success for index in range(config.episodes))
    result = Result(state["updates"], wins, config.episodes)
    write_atomically(config.snapshot.with_suffix(".json"), json.dumps(asdict(result)).encode())
    return result


def main() -> int:
    config = tyro.cli(Evaluate, prog="python -m training.evaluate", description=Evaluate.__doc__)
    os.nice(BELOW_TRAINING)
    try:
        result = evaluate(config)
    except (Rejected, OSError) as error:
        print(f"evaluation stopped: {error}", file=sys.stderr)
        return 1
    low, high = result.interval
    print(f"{result.successes} of {result.episodes} succeeded (95 % interval {low:.1%} to {high:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
