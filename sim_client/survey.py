"""Measure every task with its expert and write the page about them: `python -m sim_client.survey --help`."""

import importlib
import inspect
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from protos.files import require_writable, write_atomically
from sim_client import ENV_IDS, MAX_STEPS, TaskName
from sim_client.env import Obs
from sim_client.interval import wilson
from sim_client.look import exit_code, save
from sim_client.rollout import rollout
from sim_client.seeds import SURVEYED
from sim_client.tasks import TWINS, maker
from sim_client.workers import end_with_the_parent
from sim_client.world import World, unwrapped

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SECTORS = 8
PICTURED_SEED, PICTURED_STEPS = 3, (0, 3)


@dataclass(frozen=True)
class Survey:
    """Run every task's expert and write a page with pictures, success rates and speeds. Exit code 0; 2 when they
    cannot be written, or a worker was killed; 130 when it was interrupted.

    Example: python -m sim_client.survey --episodes 500 --output docs/tasks.md
    """

    output: Path = Path("docs/tasks.md")
    """The page; its pictures go into images/ beside it."""
    episodes: int = 500
    """Of each task."""
    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """Which ones."""
    workers: int = 1
    """Tasks measured at once, a core for each; speeds are per core, and those of a busy machine."""

    def __post_init__(self) -> None:
        if min(self.episodes, self.workers, len(self.tasks)) < 1:
            raise ValueError("--episodes and --workers must be at least 1, and --tasks name one")


@dataclass(frozen=True)
class Measured:
    """What the expert did in one task."""

    task: TaskName
    success: np.ndarray
    """bool [episodes]"""
    orientation: np.ndarray
    """float64 [episodes] radians: how the scene was turned."""
    length: float
    """Mean over successful episodes."""
    steps_per_s: float
    """Control steps, rendering and expert included, resets apart."""
    reset_ms: float

    def worst_sector(self) -> tuple[float, float]:
        """(success rate, its distance from the mean) of the worst eighth of the circle."""
        sector = np.floor(np.mod(self.orientation, 2 * math.pi) / (2 * math.pi) * SECTORS).astype(int) % SECTORS
        rates = [self.success[sector == i].mean() for i in range(SECTORS) if (sector == i).any()]
        return float(min(rates)), float(self.success.mean() - min(rates))


def measure(task: TaskName, episodes: int) -> Measured:
    """Run `episodes` of the expert in `task`."""
    env = World().make(task)
    expert, resets, stepping = unwrapped(env).expert_action, list[float](), 0.0
    success, orientation, lengths = list[bool](), list[float](), list[int]()
    for index in range(episodes):
        begun = time.perf_counter()
        ready: list[float] = []

        def act(obs: Obs, info: dict[str, Any], ready: list[float] = ready) -> NDArray[np.float32]:
            if not ready:
                ready.append(time.perf_counter())
                orientation.append(info["orientation"])
            return expert()

        episode = rollout(env, act, SURVEYED + index)
        stepping += time.perf_counter() - ready[0]
        resets.append(ready[0] - begun)
        success.append(episode.success)
        lengths.append(len(episode))
    env.close()
    won = [length for length, good in zip(lengths, success, strict=True) if good]
    return Measured(
        task,
        np.array(success),
        np.array(orientation),
        float(np.mean(won)) if won else math.nan,
        sum(lengths) / stepping,
        1000 * float(np.median(resets)),
    )


def picture(task: TaskName, path: Path) -> None:
    """The rendered scene and the depth view, at the start and a few steps later."""
    env = World().make(task, render_mode="rgb_array")
    obs, _ = env.reset(seed=PICTURED_SEED)
    figure, axes = plt.subplots(1, 2 * len(PICTURED_STEPS), figsize=(16, 4), constrained_layout=True)
    done = 0
    for (scene, view), steps in zip(axes.reshape(-1, 2), PICTURED_STEPS, strict=True):
        for _ in range(steps - done):
            obs, *_ = env.step(unwrapped(env).expert_action())
        done = steps
        scene.imshow(env.render())
        scene.set_title(f"after {steps} steps" if steps else "at the start")
        view.imshow(obs["depth"], cmap="viridis_r")
        view.set_title("what the policy sees")
        for axis in (scene, view):
            axis.axis("off")
    save(figure, path, dpi=60)
    env.close()


def page(config: Survey, results: Iterable[Measured]) -> str:
    """The page, Markdown."""
    results = list(results)
    some = f"--tasks {' '.join(config.tasks)} " if config.tasks != get_args(TaskName) else ""
    lines = [
        "# The tasks",
        "",
        "An arm over a 0.3 m x 0.3 m workspace, one control step every 0.4 s, at most "
        f"{MAX_STEPS} steps, reward 1 at success, which ends the episode. Everything on this page was made by",
        "",
        f"    python -m sim_client.survey --episodes {config.episodes} --workers {config.workers} "
        f"{some}--output {config.output.as_posix()}",
        "",
        f"Expert: the scripted expert over {config.episodes} seeded episodes, with the 95 % Wilson interval. Worst "
        "side: its success in the worst of eight 45-degree sectors of the scene's initial orientation, and how far "
        "that is below the mean. Steps/s: control steps per second on one core, depth image and expert included. "
        "Reset: the median.",
        "",
        "| task | Gymnasium id | expert | worst side | mean length | steps/s | reset |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in results:
        wins, worst = int(each.success.sum()), each.worst_sector()
        interval = wilson(wins, len(each.success))
        lines.append(
            f"| {each.task} | `{ENV_IDS[each.task]}` | {wins / len(each.success):.1%} "
            f"({interval.low:.1%} to {interval.high:.1%}) | {worst[0]:.1%} ({100 * worst[1]:.1f} points below) | "
            f"{each.length:.1f} | {each.steps_per_s:.0f} | {each.reset_ms:.0f} ms |"
        )
    for each in results:
        lines += ["", f"## {each.task}", "", _about(each.task), "", f"![{each.task}](images/{each.task}.png)"]
    return "\n".join(lines) + "\n"


def _about(task: TaskName) -> str:
    """What the task's module says of it."""
    of = TWINS.get(task) or maker(task)
    module = importlib.import_module(of.__module__)
    return inspect.cleandoc(module.__doc__ or "")


def survey(config: Survey) -> str:
    """Write the page and its pictures, and return the page. Raises OSError, before any task is run where possible."""
    pictures = {task: config.output.parent / "images" / f"{task}.png" for task in config.tasks}
    for path in (config.output, *pictures.values()):
        require_writable(path)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, context, initializer=_start) as pool:
        measured = pool.map(measure, config.tasks, [config.episodes] * len(config.tasks))
        try:
            results = list(tqdm(measured, total=len(config.tasks), unit="task", desc="survey"))
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()  # or the pool waits for whole tasks
            raise
    for task, path in pictures.items():
        picture(task, path)
    text = page(config, results)
    write_atomically(config.output, text.encode())
    return text


def _start() -> None:
    """A worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the workers too
    end_with_the_parent()


def main() -> int:
    config = tyro.cli(Survey, prog="python -m sim_client.survey", description=Survey.__doc__)
    return exit_code(lambda: survey(config).partition("\n## ")[0])


if __name__ == "__main__":
    sys.exit(main())
