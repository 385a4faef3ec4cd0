"""Snapshots of a run on their way to a closed-loop success rate.

A run leaves OUTPUT/evaluations/update-0001000.pt; a process of `training.evaluate` plays the task with it and writes
its result beside it. Files are all that passes between them: whichever is killed, nothing is lost.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from protos.errors import Rejected
from protos.files import write_atomically
from sim_client.interval import Interval, wilson
from training.loop import Run

FOLDER, BEST = "evaluations", "best.pt"
LOOK_EVERY_S = 0.5


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
    def interval(self) -> Interval:
        return wilson(self.successes, self.episodes)


class EvaluationError(RuntimeError):
    """An evaluation ended without a result."""


class Evaluations:
    """The snapshots of a run on their way to a success rate: one process at a time, the others wait."""

    def __init__(self, run: Run) -> None:
        """Raises Rejected when nothing says in which world to evaluate."""
        if run.dataset.env_spec is None:
            raise Rejected("--eval-every", "data of a simulator", "data without one", "leave out --eval-every")
        self._run, self._folder = run, run.config.output / FOLDER
        self._process: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (not a pipe: nobody reads while it runs)
        self._result = self._folder  # where the process will write it
        self._told: set[int] = set()
        self._unsettled: set[int] = set()

    def resume(self) -> None:
        """Tell no result again that the run told before; call it after `Run.restore`.

        A told one's snapshot is gone. Beyond the checkpoint all are told again: the curves end there.
        """
        told = {r.update for r in self.results() if not self._snapshot(r.update).exists()}
        self._told = {update for update in told if update <= self._run.updates}

    def take(self) -> None:
        """Leave a snapshot of the agent as it is now, unless this update has one, or a result, from before a kill.

        One that waits may be under evaluation already, and its result must stay that of the weights beside it.
        """
        snapshot = self._snapshot(self._run.updates)
        if not (snapshot.exists() or snapshot.with_suffix(".json").exists()):
            agent, data = self._run.learner.agent, self._run.dataset
            state = {"agent": agent.state_dict(), "spec": data.spec.to_json(), "env_spec": data.env_spec}
            self._run.write(f"{FOLDER}/{snapshot.name}", state)
        self._start_the_next()

    def poll(self) -> list[Result]:
        """Start the next evaluation if none is under way; what has come in since the last call.

        Until `settle`, a killed run tells it again.

        Raises EvaluationError when an evaluation failed.
        """
        self._start_the_next()
        results = self.results()
        fresh = [r for r in results if r.update not in self._told]
        self._told |= {r.update for r in fresh}
        self._unsettled |= {r.update for r in fresh}
        if fresh:
            self._keep_the_best(results)
        return fresh

    def settle(self) -> None:
        """What was told is kept: its snapshots may go."""
        for update in self._unsettled:
            self._snapshot(update).unlink(missing_ok=True)
        self._unsettled.clear()

    def wait(self, stop: threading.Event) -> list[Result]:
        """Finish every evaluation, or stop waiting; what has come in since the last call."""
        fresh = self.poll()
        while self._process is not None and not stop.is_set():
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LOOK_EVERY_S)
            if not stop.is_set():  # who ends this run may have ended its evaluation, too
                fresh += self.poll()
        return fresh

    def results(self) -> list[Result]:
        """Of all evaluations so far, in the order of their updates."""
        return [Result(**json.loads(path.read_text())) for path in self._in_order(".json")]

    @property
    def unfinished(self) -> int:
        """How many have no result yet, the one under way included."""
        return len(self._waiting())

    @property
    def exhausted(self) -> bool:
        """Whether --patience evaluations in a row brought nothing better."""
        results, patience = self.results(), self._run.config.patience
        if patience is None or not results:
            return False
        reached = max(results, key=lambda r: (r.interval.low, -r.update))  # of equals the first: a tie is no better
        return sum(r.update > reached.update for r in results) >= patience

    def stop(self) -> None:
        """End the evaluation under way; its snapshot waits for a resumed run."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _start_the_next(self) -> None:
        """Raises EvaluationError when the one before failed."""
        if self._process is not None and self._process.poll() is not None:
            failed = self._process.returncode
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip()
            self._process = None
            if failed and not self._result.exists():  # another of the same, left by a run that was killed, was faster
                raise EvaluationError(f"an evaluation failed with exit code {failed}: {said[-500:]}")
        waiting = self._waiting()
        if self._process is None and waiting:
            self._result = waiting[0].with_suffix(".json")
            command = ["training.evaluate", str(waiting[0]), "--episodes", str(self._run.config.eval_episodes)]
            self._said.seek(0)
            self._said.truncate()
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=subprocess.DEVNULL, stderr=self._said,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # Ctrl-C is for the training, which then stops this itself
            )  # fmt: skip

    def _waiting(self) -> list[Path]:
        return [p for p in self._in_order(".pt") if not p.with_suffix(".json").exists()]

    def _in_order(self, suffix: str) -> list[Path]:
        """Those of this run, and nothing else that lies there."""
        updates = {path: path.stem.removeprefix("update-") for path in self._folder.glob(f"update-*{suffix}")}
        return sorted((path for path, update in updates.items() if update.isdecimal()), key=lambda p: int(updates[p]))

    def _keep_the_best(self, results: list[Result]) -> None:
        chosen = self._snapshot(best(results).update)
        if chosen.exists():
            write_atomically(self._run.config.output / BEST, chosen.read_bytes())

    def _snapshot(self, update: int) -> Path:
        return self._folder / f"update-{update:07d}.pt"


def best(results: Iterable[Result]) -> Result:
    """The highest success rate, as far as its episodes can tell; of equals, the longest trained."""
    return max(results, key=lambda r: (r.interval.low, r.update))
