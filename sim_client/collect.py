"""Record episodes into a Minari dataset: `python -m sim_client.collect --help`."""

import sys
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
from sim_client.episodes import Episode
from sim_client.rollout import rollout
from sim_client.store import About, write


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
                    episode = episode.cut(wanted - done)
                index += 1
                step = 1 if config.episodes else len(episode)
                done += step
                bar.update(step)
                yield episode
    finally:
        env.close()


def about(config: Collect) -> About:
    """What the dataset says of itself."""
    env_id = ENV_IDS[config.task]
    return About(
        spec=SPEC,
        task=config.task,
        behavior=config.behavior,
        dataset_id=f"equiserve/{config.task.replace('_', '-')}/{config.behavior}-v0",
        env_spec=gymnasium.spec(env_id).to_json(),
        notes={"seed": config.seed},
    )


def main() -> int:
    config = tyro.cli(Collect, description=Collect.__doc__)
    if config.output.exists():
        print(f"{config.output} exists already: choose another --output or remove it first", file=sys.stderr)
        return 2
    start = time.perf_counter()
    episodes = list(record(config))
    seconds = time.perf_counter() - start
    write(config.output, episodes, about(config))
    steps = sum(map(len, episodes))
    successes = sum(e.success for e in episodes)
    print(
        f"{config.output}: {len(episodes)} episodes, {steps} transitions, {successes} successful, "
        f"mean length {np.mean([len(e) for e in episodes]):.1f}, {steps / seconds:.0f} control steps/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
