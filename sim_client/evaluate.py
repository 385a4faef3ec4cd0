"""The stand-in robot's closed loop through a policy server: `python -m sim_client.evaluate --help`."""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import gymnasium as gym
import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from protos.errors import Rejected
from protos.files import require_writable, write_atomically
from protos.spaces import Pose
from serving.client import PolicyClient, PolicyError
from serving.connection import Connection
from sim_client import TaskName
from sim_client.env import Obs, observation_of
from sim_client.episodes import Episode
from sim_client.interval import wilson
from sim_client.rollout import rollout
from sim_client.seeds import EVALUATED, EVALUATED_PER_SEED
from sim_client.world import World, unwrapped

T = TypeVar("T")
BUSY_WAIT_S = 0.02
"""After a refusal for lack of room: a control period at 50 Hz."""


@dataclass(frozen=True)
class Evaluate:
    """Close the loop through a policy server and report the success rate.

    The robot acts through gRPC alone. Exit code 0, or 1 when the success rate is below --min-success, or 2 when the
    evaluation could not be done, or 130 when it was interrupted: then there is a summary of what was done, and no
    report.

    Example: python -m sim_client.evaluate --server localhost:50051 --task drawer_opening --episodes 50
    """

    connection: Annotated[Connection, tyro.conf.arg(name="")] = field(default_factory=Connection)
    task: TaskName = "drawer_opening"
    """What the robot is to do."""
    policy: str = ""
    """Name of the policy to ask for; empty: the server's default."""
    episodes: int = 50
    """How many episodes."""
    seed: int = 0
    """Of the scenes, none of which is collected. A policy that learned from a server's recordings of an evaluation
    needs another seed than that had."""
    report: Path | None = None
    """Write the report here, as JSON."""
    min_success: float | None = None
    """Exit with 1 when the success rate is below this share."""
    timeout_s: float = 5.0
    """Deadline of one call, and for how long a server may refuse one for lack of room or for an old frame."""
    wait_s: float = 30.0
    """How long to wait for a server that is still starting."""
    world: Annotated[World, tyro.conf.arg(name="")] = field(default_factory=World)

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"--timeout-s must be positive seconds, finite ones, got {self.timeout_s}")
        if not 0 <= self.wait_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"--wait-s must be finite seconds, not below 0, got {self.wait_s}")
        if not 1 <= self.episodes <= EVALUATED_PER_SEED:
            raise ValueError(f"--episodes must be at least 1, and at most {EVALUATED_PER_SEED}, got {self.episodes}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        if self.min_success is not None and not 0 <= self.min_success <= 1:
            raise ValueError(f"--min-success is a share between 0 and 1, got {self.min_success}")


class Outcome(NamedTuple):
    """Of one episode; its frames would be 3 MB."""

    seed: int
    steps: int
    success: bool


class Robot:
    """Acts through a client, an episode at a time, and keeps what it saw: latencies, interventions, holds, refusals.

    Raises PolicyError, also when the server had no room or no time for a call for `patience_s`.
    """

    def __init__(self, client: PolicyClient, patience_s: float) -> None:
        self._client, self._patience_s = client, patience_s
        self.latency_ms: list[float] = []
        self.interventions = self.holds = self.refusals = 0

    def run(self, env: gym.Env[Obs, NDArray[np.float32]], seed: int) -> Episode:
        """One scene, as one episode of the server: its recording, if it makes one, is labelled with the outcome."""
        with contextlib.ExitStack() as stack:
            served = self._patiently(lambda: stack.enter_context(self._client.episode()))

            def act(obs: Obs, info: dict[str, Any]) -> NDArray[np.float32]:
                observation, pose = observation_of(obs), Pose(*map(float, info["tool_pose"]))
                answer = self._patiently(lambda: served.act(observation, pose))
                self.latency_ms.append(answer.latency_ms)
                self.interventions += len(answer.interventions)
                self.holds += answer.hold
                return answer.action

            episode = rollout(env, act, seed)
            served.succeeded(episode.success)
        return episode

    def _patiently(self, ask: Callable[[], T]) -> T:
        """A robot would skip a step that came too late; here the world stands still meanwhile, so ask again."""
        patient_until = time.monotonic() + self._patience_s
        while True:
            try:
                return ask()
            except PolicyError as error:
                if not (error.busy or error.late) or time.monotonic() >= patient_until:
                    raise
            self.refusals += 1
            time.sleep(BUSY_WAIT_S)


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Run the episodes and return the report.

    Raises:
        PolicyError: when the server refuses or cannot be reached.
        Rejected: when it serves another contract.
        KeyboardInterrupt: this and a PolicyError in the middle have a note of what was done until then.
    """
    print(f"waiting for {config.connection.server}, {config.wait_s:g} s at most", file=sys.stderr)
    with contextlib.closing(config.world.make(config.task)) as env:
        return _evaluate(config, env)


def _evaluate(config: Evaluate, env: gym.Env[Obs, NDArray[np.float32]]) -> dict[str, Any]:
    def connected(policy: str, version: str = "") -> PolicyClient:
        spec = unwrapped(env).spec_of_policy
        return PolicyClient.of(config.connection, policy, version, spec=spec, timeout_s=config.timeout_s)

    with connected(config.policy) as client:
        info = client.wait_ready(config.wait_s)
    if info.task != config.task:
        print(f"policy {info.name} was trained for {info.task}, the task here is {config.task}", file=sys.stderr)
    # The version that the report speaks of, whatever is loaded meanwhile.
    with connected(info.name, info.version) as client:
        robot = Robot(client, config.timeout_s)
        episodes: list[Outcome] = []
        start = time.perf_counter()
        try:
            for index in (bar := tqdm(range(config.episodes), unit="episode", desc=config.task)):
                seed = EVALUATED + config.seed * EVALUATED_PER_SEED + index
                episode = robot.run(env, seed)
                episodes.append(Outcome(seed, len(episode), episode.success))
                bar.set_postfix_str(f"{sum(e.success for e in episodes)}/{len(episodes)} succeeded")
        except (KeyboardInterrupt, PolicyError) as error:
            succeeded = sum(e.success for e in episodes)
            error.add_note(f"after {len(episodes)} of {config.episodes} episodes, of which {succeeded} succeeded")
            raise
        seconds = time.perf_counter() - start
    return _report(config, info, episodes, robot, seconds)


def _report(config: Evaluate, policy: Any, episodes: list[Outcome], robot: Robot, seconds: float) -> dict[str, Any]:
    successes = sum(e.success for e in episodes)
    steps = sum(e.steps for e in episodes)
    interval = wilson(successes, len(episodes))
    return {
        "task": config.task,
        "seed": config.seed,
        "world": asdict(config.world),
        "episodes": len(episodes),
        "successes": successes,
        "success_rate": successes / len(episodes),
        "wilson_low": interval.low,
        "wilson_high": interval.high,
        "latency_ms": {f"p{q}": float(np.percentile(robot.latency_ms, q)) for q in (50, 95, 99)},
        "control_steps": steps,
        "control_steps_per_s": steps / seconds,
        "interventions": robot.interventions,
        "holds": robot.holds,
        "refusals": robot.refusals,
        "policy": policy.name,
        "policy_task": policy.task,
        "policy_version": policy.version,
        "policy_sha256": policy.sha256,
        "seconds": {"evaluate": seconds},
        "lengths": [e.steps for e in episodes],
        "failed_seeds": [e.seed for e in episodes if not e.success],
    }


def main() -> int:
    try:
        config = tyro.cli(Evaluate, prog="python -m sim_client.evaluate", description=Evaluate.__doc__)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, the server is told that the episode ends
    try:
        if config.report:
            require_writable(config.report)
    except OSError as error:
        return _no_report(config, error)
    try:
        report = evaluate(config)
    except KeyboardInterrupt as interrupted:
        print(f"interrupted{_so_far(interrupted)}", file=sys.stderr)
        return 128 + signal.SIGINT
    except (PolicyError, Rejected, ValueError, OSError) as error:
        print(f"evaluation stopped{_so_far(error)}: {error}", file=sys.stderr)
        return 2
    latency = report["latency_ms"]
    print(
        f"{report['task']}: {report['successes']} of {report['episodes']} episodes succeeded, "
        f"{report['success_rate']:.1%} (95 % interval {report['wilson_low']:.1%} to {report['wilson_high']:.1%}); "
        f"latency p50 {latency['p50']:.1f} ms, p95 {latency['p95']:.1f} ms, p99 {latency['p99']:.1f} ms; "
        f"{report['control_steps_per_s']:.0f} control steps/s"
    )
    if config.report:
        try:
            write_atomically(config.report, (json.dumps(report, indent=2) + "\n").encode())
        except OSError as error:
            return _no_report(config, error)
    if config.min_success is not None and report["success_rate"] < config.min_success:
        print(f"below --min-success {config.min_success:.1%}", file=sys.stderr)
        return 1
    return 0


def _so_far(error: BaseException) -> str:
    return "".join(f" {note}" for note in getattr(error, "__notes__", ()))


def _no_report(config: Evaluate, error: OSError) -> int:
    print(f"--report {config.report}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
