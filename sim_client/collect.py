"""Record episodes into a Minari dataset: `python -m sim_client.collect --help`."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial as bind
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from protos.errors import Rejected
from protos.files import Taken, held
from serving.errors import PolicyRefused
from sim_client import TaskName
from sim_client.behaviors import Actors, Mixture, parse
from sim_client.calibrate import MOST_NOISE, calibrate
from sim_client.episodes import Episode
from sim_client.rollout import rollout
from sim_client.seeds import RECORDED_PER_SEED, SEEDS
from sim_client.store import About, dataset_id, write
from sim_client.workers import Partial, Record, episodes
from sim_client.world import World, unwrapped

MOST_WORKERS = 4
"""For each core."""
HOPELESS = 1000
"""So many failures in a row, where only successes are kept, and it is time to say that there may be none."""


@dataclass(frozen=True)
class Collect:
    """Record episodes of a task into a Minari dataset.

    Give either --episodes or --transitions. Episode i is seeded with SEED * 1 000 000 + i, so that more episodes of the
    same seed extend the same data, no two seeds share an episode, and the number of workers changes nothing.
    Interrupted, by whatever, the same command goes on where it was. Exit code 0 when all is recorded, 2 when it was
    refused, 130 when it was interrupted, and 1 when something else ended it.

    Examples:
      python -m sim_client.collect --task drawer_opening --episodes 20 --output runs/drawer20
      python -m sim_client.collect --task block_in_bowl --behavior noisy --target-success 0.4 --transitions 1000
          --workers 2 --output runs/bowl_noisy
      python -m sim_client.collect --behavior mixed:expert=0.2,policy:runs/early/policy.onnx=0.8 --episodes 100
          --output runs/mixed
    """

    output: Path
    """Directory of the new dataset; must not exist. MinariDataset("OUTPUT/data") opens it."""
    task: TaskName = "drawer_opening"
    """What to record."""
    behavior: str = "expert"
    """Who acts: expert, noisy (an expert with a shaking hand), random, policy:FILE, or mixed:A=SHARE,B=SHARE,..."""
    episodes: int | None = None
    """Record this many episodes."""
    transitions: int | None = None
    """Record until there are this many transitions; the last episode is cut to fit."""
    seed: int = 0
    """Of the scenes, and of the behaviour's chance."""
    keep_failures: bool = True
    """Keep episodes that do not succeed; they count only if kept. Without them the last episode is not cut, or it
    would be one: there may be some transitions more than asked for."""
    noise: float | None = None
    """How much the noisy expert's hand shakes, in units of each motion's bound."""
    target_success: float | None = None
    """Choose the noise for this success rate instead, of the noisy expert's own episodes: 0.4 means the same quality of
    data on every task. Finding it takes 600 episodes, some minutes, whatever is recorded then; the data's notes have
    it, for --noise."""
    workers: int = 1
    """Processes that record."""
    world: Annotated[World, tyro.conf.arg(name="")] = field(default_factory=World)

    def __post_init__(self) -> None:
        if (self.episodes is None) == (self.transitions is None):
            raise ValueError("give either --episodes N or --transitions N")
        if (self.episodes or self.transitions or 0) < 1:
            raise ValueError(f"nothing to record: --episodes {self.episodes} --transitions {self.transitions}")
        if (self.episodes or 0) > RECORDED_PER_SEED:
            raise ValueError(f"--episodes: a seed has {RECORDED_PER_SEED} scenes, got {self.episodes}")
        if not 0 <= self.seed < SEEDS:  # beyond are the scenes of evaluation
            raise ValueError(f"--seed must not be negative, and at most {SEEDS - 1}, got {self.seed}")
        most = MOST_WORKERS * (os.cpu_count() or 1)
        if not 1 <= self.workers <= most:
            raise ValueError(f"--workers must be at least 1, and here at most {most}, got {self.workers}")
        is_noisy = any(behavior.kind == "noisy" for behavior in parse(self.behavior))
        given = [value for value in (self.noise, self.target_success) if value is not None]
        if len(given) != int(is_noisy):
            neither = "neither --noise nor --target-success, which belong to a noisy behaviour"
            takes = "one of --noise X and --target-success SHARE" if is_noisy else neither
            raise ValueError(f"--behavior {self.behavior} takes {takes}")
        if self.noise is not None and not 0 <= self.noise <= MOST_NOISE:
            raise ValueError(f"--noise must not be negative, and at most {MOST_NOISE:g}, got {self.noise}")
        if self.target_success is not None and not 0 < self.target_success < 1:
            raise ValueError(f"--target-success is a share between 0 and 1, got {self.target_success}")


class Recorder:
    """Runs episodes by number; one per process."""

    def __init__(self, task: TaskName, world: World, mixture: Mixture, noise: float, first_seed: int) -> None:
        self._env = world.make(task)
        self._actors = Actors(self._env, noise)
        self._mixture, self._first_seed = mixture, first_seed

    def close(self) -> None:
        self._env.close()

    def __call__(self, index: int) -> Episode:
        seed, behavior = self._first_seed + index, self._mixture.of_episode(index)
        act = self._actors.actor(behavior, np.random.default_rng((seed, 1)))
        return dataclasses.replace(rollout(self._env, act, seed), behavior=str(behavior))


def recorder(config: Collect, noise: float) -> Record:
    """What records the episodes of `config`."""
    return Recorder(config.task, config.world, parse(config.behavior), noise, config.seed * RECORDED_PER_SEED)


def record(config: Collect, partial: Partial, noise: float) -> Iterator[Episode]:
    """The episodes that `config` asks for, in order; each is on disk before the next begins.

    Raises ValueError where only successes are kept and there are none, or a seed has not enough scenes.
    """
    wanted = config.episodes or config.transitions or 0
    endless = episodes(partial, bind(recorder, config, noise), config.workers)
    with (
        contextlib.closing(endless),  # type: ignore[type-var]
        tqdm(total=wanted, unit="episode" if config.episodes else "transition", desc=config.task) as bar,
    ):
        done = failures = 0
        for index, episode in enumerate(islice(endless, RECORDED_PER_SEED)):
            bar.set_postfix_str(f"{index + 1} episodes run")
            if not (episode.success or config.keep_failures):
                partial.reject(index, episode)
                failures += 1
                if failures == HOPELESS:
                    endless.close()  # type: ignore[attr-defined]  # workers would write into it again
                    if not done:
                        partial.remove()  # so that another behaviour may have the place
                    raise ValueError(
                        f"--behavior {config.behavior}: {failures} episodes in a row failed, and without failures "
                        "(--no-keep-failures) nothing is left of them; choose one that can do the task"
                    )
                continue
            failures = 0
            whole = config.episodes or not config.keep_failures
            kept = episode if whole else episode.cut(wanted - done)
            step = 1 if config.episodes else len(kept)
            done += step
            bar.update(step)
            yield kept
            if done >= wanted:
                return
        raise ValueError(
            f"--seed {config.seed} has {RECORDED_PER_SEED} scenes, and they are not enough: collect less by each of "
            "several seeds, and join them by training.data merge"
        )


def prepare(config: Collect) -> About:
    """What the dataset will say of itself. Loads and proves the policies that are to act, before anything runs."""
    env = config.world.make(config.task)
    try:
        actors = Actors(env, noise=0.0)
        for behavior in parse(config.behavior):
            actors.actor(behavior, np.random.default_rng())
        for file, policy in actors.policies.items():
            if (of := policy.manifest.task) != config.task:
                print(f"policy {file} was trained for {of}, the task here is {config.task}", file=sys.stderr)
        policies = {str(file): policy.sha256 for file, policy in actors.policies.items()}
        assert env.spec is not None  # Gymnasium made it
        return About(
            spec=unwrapped(env).spec_of_policy,
            task=config.task,
            behavior=config.behavior,
            dataset_id=dataset_id(config.task, config.behavior.partition(":")[0]),
            env_spec=env.spec.to_json(),
            notes={"seed": config.seed} | ({"policies": policies} if policies else {}),
        )
    finally:
        env.close()


@dataclass(frozen=True)
class Summary:
    """What was recorded."""

    episodes: int
    successes: int
    transitions: int
    seconds: float
    disk_bytes: int


def collect(config: Collect) -> Summary:
    """Record and write `config.output`.

    Raises:
        FileExistsError: the output exists, an interrupted collection asked for something else, or another process
            records the same.
        PolicyRefused, Rejected: a policy file cannot act here, or no noise comes near to --target-success.
        ValueError: only successes are to be kept, and there are none; or a seed has not enough scenes.
        OSError: the disk; what is recorded stays for the next run.
    """
    if config.output.exists():
        raise FileExistsError(f"{config.output} exists already: choose another --output or remove it first")
    about = prepare(config)
    request = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "workers")}
    if "policies" in about.notes:  # a file may have been replaced since
        request["policies"] = about.notes["policies"]
    folder = Partial.folder_of(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder):
            return _collect(config, about, Partial(config.output, json.loads(json.dumps(request, default=str))))
    except Taken as error:
        raise FileExistsError(
            f"another process records {config.output}: let it finish, or choose another --output"
        ) from error


def _collect(config: Collect, about: About, partial: Partial) -> Summary:
    noise, notes = config.noise or 0.0, dict(about.notes)
    if config.target_success is not None:
        try:
            noise, reached = calibrate(
                lambda noise: bind(_noisy_recorder, config, noise),
                partial.folder,
                config.target_success,
                config.workers,
            )
        except Rejected:
            if not any(partial.folder.glob("*.npz")):  # as an older version may have left them
                partial.remove()  # so that another share may have the place
            raise
        notes |= {"target_success": config.target_success, "calibrated_success": reached}
    if any(behavior.kind == "noisy" for behavior in parse(config.behavior)):
        notes["noise"] = noise
    start, recorded = time.perf_counter(), []

    def watched() -> Iterator[Episode]:
        for episode in record(config, partial, noise):
            recorded.append((len(episode), episode.success))
            yield episode

    write(config.output, watched(), dataclasses.replace(about, notes=notes))
    partial.remove()
    lengths, successes = zip(*recorded, strict=True)
    disk_bytes = sum(file.stat().st_size for file in config.output.rglob("*") if file.is_file())
    return Summary(len(recorded), sum(successes), sum(lengths), time.perf_counter() - start, disk_bytes)


def _noisy_recorder(config: Collect, noise: float, first_seed: int) -> Record:
    return Recorder(config.task, config.world, parse("noisy"), noise, first_seed)


def main() -> int:
    config = tyro.cli(Collect, prog="python -m sim_client.collect", description=Collect.__doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, what is under way is cleared up
    try:
        done = collect(config)
    except (FileExistsError, PolicyRefused, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, BrokenProcessPool, KeyboardInterrupt) as error:
        further = "; the same command goes on from here" if Partial.left_of(config.output) else ""
        print(f"stopped: {str(error) or 'interrupted'}{further}", file=sys.stderr)
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    print(
        f"{config.output}: {done.episodes} episodes, {done.transitions} transitions, {done.successes} successful, "
        f"mean length {done.transitions / done.episodes:.1f}, {done.transitions / done.seconds:.0f} control steps/s, "
        f"{done.disk_bytes / done.transitions / 1000:.1f} kB on disk per transition"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
