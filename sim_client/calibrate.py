"""How much noise makes an expert succeed at a given rate: sub-optimal data that mean the same thing on every task."""

import contextlib
import json
from collections.abc import Callable
from functools import partial as bind
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from protos.files import write_atomically
from sim_client.workers import Partial, Record, episodes

FIRST_SEED = 800_000_000
"""Scenes of calibration: neither recorded nor evaluated."""
LEAST, MOST = 0.05, 4.0
ROUNDS = 7
EPISODES = 60
"""Per round. The same scenes in each, so that only the noise differs; a rate of 40 % is known to 6 points."""


def calibrate(
    make: Callable[[float], Callable[[int], Record]], folder: Path, target: float, workers: int
) -> tuple[float, float]:
    """(noise, success rate reached) whose rate is nearest to `target`, by bisection of the noise's logarithm.

    `make(noise)(first_seed)` is a recorder. The answer is kept in `folder`: an interrupted collection goes on with it.
    """
    answer = folder / "calibration.json"
    if answer.exists():
        found = json.loads(answer.read_text())
        return found["noise"], found["success"]
    low, high, tried = LEAST, MOST, []
    with tqdm(total=ROUNDS * EPISODES, unit="episode", desc="calibrate the noise") as bar:
        for turn in range(ROUNDS):
            noise = (low * high) ** 0.5
            scratch = Partial(folder / f"noise{turn}", {"noise": noise})
            successes = 0
            with contextlib.closing(episodes(scratch, bind(make(noise), FIRST_SEED), workers)) as endless:  # type: ignore[type-var]
                for episode in islice(endless, EPISODES):
                    successes += episode.success
                    bar.update()
            scratch.remove()
            tried.append((noise, successes / EPISODES))
            bar.set_postfix_str(f"noise {noise:.2f}: {tried[-1][1]:.0%}")
            low, high = (noise, high) if tried[-1][1] > target else (low, noise)
    noise, success = min(tried, key=lambda each: abs(each[1] - target))
    write_atomically(answer, json.dumps({"noise": noise, "success": success}).encode())
    return noise, success
