"""Record episodes into a Minari dataset: `python -m sim_client.collect --help`."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import tyro
from tqdm import tqdm

from protos.spaces import SPEC
from sim_client import ENV_IDS
from sim_client.rollout import Episode, rollout


@dataclass(frozen=True)
class Collect:
    """Record episodes of a task into a Minari dataset.

    Give either --episodes or --transitions. Episode i is seeded with SEED * 1 000 000 + i, so that more episodes of the
    same seed extend the same data and no two seeds share an episode.

    Example: python -m sim_client.collect --task drawer_opening --episodes 20 --output runs/drawer20
    """

    output: Path
    """Directory of the new dataset; must not exist. MinariDataset("OUTPUT/data") opens it."""
    task: Literal["drawer_opening"] = "drawer_opening"
    """What to record."""
    behavior: Literal["expert"] = "expert"
    """Who acts: the task's scripted expert."""
    episodes: int | None = None
    """Record this many episodes."""
    transitions: int | None = None
    """Record until there are this many transitions; the last episode is cut to fit."""
    seed: int = 0
    """Of the scenes."""

    def __post_init__(self) -> None:
        if (self.episodes is None) == (self.transitions is None):
            raise ValueError("give either --episodes N or --transitions N")
        if (self.episodes or self.transitions or 0) < 1:
            raise ValueError(f"nothing to record: --episodes {self.episodes} --transitions {self.transitions}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")


EPISODES_PER_SEED = 1_000_000


def record(config: Collect) -> Iterator[Episode]:
    """The episodes that `config` asks for, in order."""
    env = gymnasium.make(ENV_IDS[config.task])
    expert = env.unwrapped.expert_action  # type: ignore[attr-defined]
    try:
        wanted = config.episodes or config.transitions or 0
        with tqdm(total=wanted, unit="episode" if config.episodes else "transition", desc=config.task) as bar:
            done = index = 0
            while done < wanted:
                episode = rollout(env, lambda obs, info: expert(), config.seed * EPISODES_PER_SEED + index)
                if config.transitions:
                    episode = _cut(episode, wanted - done)
                index += 1
                step = 1 if config.episodes else len(episode)
                done += step
                bar.update(step)
                yield episode
    finally:
        env.close()


def _cut(episode: Episode, length: int) -> Episode:
    """At most the first `length` steps; an episode that loses its end was truncated, not terminated."""
    if len(episode) <= length:
        return episode
    return Episode(
        seed=episode.seed,
        depth=episode.depth[: length + 1],
        gripper=episode.gripper[: length + 1],
        action=episode.action[:length],
        reward=episode.reward[:length],
        terminated=False,
        truncated=True,
    )


def write(config: Collect, episodes: list[Episode]) -> None:
    """Write a Minari dataset to `config.output`, whole or not at all."""
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.output.parent.resolve(), prefix=f".{config.output.name}.") as scratch:
        os.environ["MINARI_DATASETS_PATH"] = scratch  # minari's only way to choose where a dataset goes
        import minari
        from minari.data_collector import EpisodeBuffer

        buffers = [
            EpisodeBuffer(
                id=index,
                seed=episode.seed,
                observations={"depth": list(episode.depth), "gripper": list(episode.gripper)},
                actions=list(episode.action),
                rewards=episode.reward.tolist(),
                terminations=[False] * (len(episode) - 1) + [episode.terminated],
                truncations=[False] * (len(episode) - 1) + [episode.truncated],
            )
            for index, episode in enumerate(episodes)
        ]
        dataset_id = f"equiserve/{config.task.replace('_', '-')}/{config.behavior}-v0"
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=ENV_IDS[config.task],
            eval_env=ENV_IDS[config.task],
            algorithm_name=config.behavior,
            author="equiserve",
            author_email="none",
            code_permalink="none",
            description=f"{config.task}, {config.behavior} behaviour, seed {config.seed}, top-down depth view",
            requirements=["equiserve[sim]"],
            jpeg_encoding=False,  # lossy otherwise
        )
        dataset.storage.update_metadata(
            {
                "task": config.task,
                "behavior": config.behavior,
                "seed": config.seed,
                "contract": SPEC.to_json(),
                "contract_digest": SPEC.digest,
            }
        )
        (Path(scratch) / dataset_id).rename(config.output)


def main() -> int:
    config = tyro.cli(Collect, description=Collect.__doc__)
    if config.output.exists():
        print(f"{config.output} exists already: choose another --output or remove it first", file=sys.stderr)
        return 2
    start = time.perf_counter()
    episodes = list(record(config))
    seconds = time.perf_counter() - start
    write(config, episodes)
    steps = sum(map(len, episodes))
    successes = sum(e.success for e in episodes)
    print(
        f"{config.output}: {len(episodes)} episodes, {steps} transitions, {successes} successful, "
        f"mean length {np.mean([len(e) for e in episodes]):.1f}, {steps / seconds:.0f} control steps/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
