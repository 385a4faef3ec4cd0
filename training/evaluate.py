"""Closed-loop success of a policy that is still in training, measured in processes of their own.

A run leaves snapshots, OUTPUT/evaluations/update-0001000.pt; `python -m training.evaluate SNAPSHOT` plays the task with
one and writes its result beside it. Files are all that passes between them: whichever is killed, nothing is lost.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray
from scipy.stats import binomtest

import sim_client  # noqa: F401  (registers the tasks)
from protos.errors import Rejected
from protos.files import write_atomically
from protos.spaces import PolicySpec
from sim_client.rollout import rollout
from training.config import recorded
from training.export import Graph
from training.loop import Run, make_agent

FOLDER, BEST = "evaluations", "best.pt"
FIRST_SEED = 850_000_000
"""Scenes of these evaluations: neither recorded, nor calibrated on, nor those of sim_client.evaluate."""
BELOW_TRAINING = 10
"""Niceness: training keeps the pace that it has alone, as far as there are cores."""


@dataclass(frozen=True)
class Result:
    """Success in closed loop after `update` updates."""

    update: int
    successes: int
    episodes: int

    @property
    def success_rate(self) -> float:
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        found = binomtest(self.successes, self.episodes).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Evaluate:
    """Play the task of a snapshot that `training.run --eval-every` left, and write the result beside it."""

    snapshot: Annotated[Path, tyro.conf.Positional]
    """OUTPUT/evaluations/update-N.pt of a run."""
    episodes: int = 50
    """How many."""


def evaluate(config: Evaluate) -> Result:
    """Roll the greedy policy out, in the world that its data were recorded in, on one thread."""
    torch.set_num_threads(1)
    state = torch.load(config.snapshot, weights_only=True, map_location="cpu")
    spec = PolicySpec.from_json(state["spec"])
    agent = make_agent(recorded(config.snapshot.parent.parent), spec)
    agent.load_state_dict(state["agent"])
    graph = Graph(agent, spec).eval()

    @torch.no_grad()
    def act(obs: dict[str, NDArray[np.float32]], info: dict[str, Any]) -> NDArray[np.float32]:
        action = graph(torch.from_numpy(obs["depth"])[None, None], torch.from_numpy(obs["gripper"])[None])[0]
        return np.asarray(spec.action.project(action[0].numpy()), np.float32)

    env = gymnasium.make(EnvSpec.from_json(state["env_spec"]))
    wins = sum(rollout(env, act, FIRST_SEED + index).success for index in range(config.episodes))
    result = Result(state["updates"], wins, config.episodes)
    write_atomically(config.snapshot.with_suffix(".json"), json.dumps(asdict(result)).encode())
    return result


class EvaluationError(RuntimeError):
    """An evaluation ended without a result."""


class Evaluations:
    """The snapshots of a run on their way to a success rate: one process at a time, the others wait."""

    def __init__(self, run: Run) -> None:
        """Raises Rejected when nothing says in which world to evaluate."""
        if run.dataset.env_spec is None:
            raise Rejected("--eval-every", "data of a simulator", "data without one", "leave out --eval-every")
        self._run, self._folder = run, run.config.output / FOLDER
        self._process: subprocess.Popen[str] | None = None
        self._told: set[int] = set()

    def take(self) -> None:
        """Leave a snapshot of the agent as it is now, unless an earlier run of this update was evaluated."""
        name = f"{FOLDER}/update-{self._run.updates:07d}.pt"
        data = self._run.dataset
        state = {"agent": self._run.learner.agent.state_dict(), "spec": data.spec.to_json(), "env_spec": data.env_spec}
        if not (self._run.config.output / name).with_suffix(".json").exists():
            self._run.write(name, state)
        self.poll()

    def poll(self) -> list[Result]:
        """Start the next evaluation if none is under way; what has come in since the last call.

        Raises EvaluationError when an evaluation failed.
        """
        if self._process is not None and self._process.poll() is not None:
            failed = self._process.returncode
            said = (self._process.stderr.read() if self._process.stderr else "").strip()
            self._process = None
            if failed:
                raise EvaluationError(f"an evaluation failed with exit code {failed}: {said[-500:]}")
        waiting = [p for p in sorted(self._folder.glob("*.pt")) if not p.with_suffix(".json").exists()]
        if self._process is None and waiting:
            command = ["training.evaluate", str(waiting[0]), "--episodes", str(self._run.config.eval_episodes)]
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                preexec_fn=lambda: os.nice(BELOW_TRAINING) and None,
            )  # fmt: skip
        results = self.results()
        fresh = [r for r in results if r.update not in self._told]
        self._told |= {r.update for r in fresh}
        if fresh:
            self._keep_the_best(results)
        return fresh

    def wait(self) -> list[Result]:
        """Finish every evaluation; what has come in since the last call."""
        fresh = self.poll()
        while self._process is not None:
            self._process.wait()
            fresh += self.poll()
        return fresh

    def results(self) -> list[Result]:
        """Of all evaluations so far, in the order of their updates."""
        return [Result(**json.loads(path.read_text())) for path in sorted(self._folder.glob("*.json"))]

    @property
    def exhausted(self) -> bool:
        """Whether --patience evaluations in a row brought nothing better."""
        results, patience = self.results(), self._run.config.patience
        return (
            patience is not None and bool(results) and sum(r.update > best(results).update for r in results) >= patience
        )

    def stop(self) -> None:
        """End the evaluation under way; its snapshot waits for a resumed run."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _keep_the_best(self, results: list[Result]) -> None:
        chosen = self._folder / f"update-{best(results).update:07d}.pt"
        if chosen.exists():
            write_atomically(self._run.config.output / BEST, chosen.read_bytes())
        for result in results:
            (self._folder / f"update-{result.update:07d}.pt").unlink(missing_ok=True)


def best(results: Iterable[Result]) -> Result:
    """The highest success rate; of equals, the longest trained."""
    return max(results, key=lambda r: (r.success_rate, r.update))


def main() -> int:
    config = tyro.cli(Evaluate, description=Evaluate.__doc__)
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
