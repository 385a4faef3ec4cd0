"""Where a control step's time goes, and what two processes buy. Prints docs/performance.md's table on the simulator.

python -m tests.benchmarks.control_step --episodes 30
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, get_args

import pybullet as p
import tyro

from sim_client import MAX_STEPS, TaskName
from sim_client.arm import Arm
from sim_client.env import TabletopEnv
from sim_client.randomization import Misplacement


@dataclass(frozen=True)
class Bench:
    """Profile control steps of every task under its expert, on one core; then run the same on two."""

    episodes: int = 30
    """Of each task."""
    tasks: tuple[TaskName, ...] = get_args(TaskName)


class Stopwatch:
    """Wraps functions and adds up how long they take, seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._apart = False

    def wrap(self, owner: Any, function: str, name: str, *, apart: bool = False) -> None:
        """`apart`: what is done inside it is not counted by other names."""
        inner: Callable[..., Any] = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            counts, start = not self._apart, time.perf_counter()
            self._apart |= apart
            result = inner(*args, **kwargs)
            if counts:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._apart &= not apart
            return result

        setattr(owner, function, timed)


def drive(env: TabletopEnv, episodes: int) -> int:
    """Run the expert; returns the number of control steps."""
    steps = 0
    for seed in range(episodes):
        env.reset(seed=seed)
        for _ in range(MAX_STEPS):
            *_, done, _, _ = env.step(env.expert_action())
            steps += 1
            if done:
                break
    return steps


def profile(task: TaskName, episodes: int) -> dict[str, float]:
    """Milliseconds per control step by phase, and "bare": stepping and rendering a still scene, nothing else."""
    env, watch = TabletopEnv(task), Stopwatch()
    env.reset(seed=0)
    start = time.perf_counter()
    for _ in range(50):
        for _ in range(96):
            p.stepSimulation(physicsClientId=env._client)
        env._camera.look((0.5, 0.0, 0.2), Misplacement())
    bare = 20 * (time.perf_counter() - start)
    physics, solve = p.stepSimulation, Arm._solve  # arms are made anew at every reset, so the class is watched
    watch.wrap(Arm, "_solve", "IK")
    watch.wrap(env._camera, "look", "rendering")
    watch.wrap(env, "expert_action", "expert")
    watch.wrap(env, "reset", "reset", apart=True)
    watch.wrap(p, "stepSimulation", "physics")
    start = time.perf_counter()
    steps = drive(env, episodes)
    total = time.perf_counter() - start
    p.stepSimulation, Arm._solve = physics, solve  # type: ignore[method-assign]
    env.close()
    parts = {name: 1000 * seconds / steps for name, seconds in watch.seconds.items()}
    parts["reset"] *= steps / episodes
    return parts | {"all": 1000 * (total - watch.seconds["reset"]) / steps, "bare": bare}


def whole(task: TaskName, episodes: int) -> int:
    """Control steps of so many episodes, resets and all."""
    env = TabletopEnv(task)
    steps = drive(env, episodes)
    env.close()
    return steps


def speed(pool: ProcessPoolExecutor, processes: int, task: TaskName, episodes: int) -> float:
    """Control steps a second of as many processes together, by one clock for all."""
    start = time.perf_counter()
    steps = sum(pool.map(whole, [task] * processes, [episodes] * processes))
    return steps / (time.perf_counter() - start)


def main() -> None:
    config = tyro.cli(Bench, description=Bench.__doc__)
    names = ("physics", "rendering", "IK", "expert", "all", "bare", "reset")
    print("| task | " + " | ".join(f"{name}, ms" for name in names) + " | steps/s | two processes |")
    print("|---|" + "---|" * (len(names) + 2))
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as one, ProcessPoolExecutor(2, mp_context=context) as two:
        for task in config.tasks:
            parts = one.submit(profile, task, config.episodes).result()
            alone, both = speed(one, 1, task, config.episodes), speed(two, 2, task, config.episodes)
            cells = " | ".join(f"{parts[name]:.1f}" for name in names)
            print(f"| {task} | {cells} | {1000 / parts['all']:.0f} | x {both / alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()
