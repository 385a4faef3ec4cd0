"""How much noise makes an expert succeed at a given rate: sub-optimal data that mean the same thing on every task."""

import contextlib
import json
from collections.abc import Callable
from functools import partial as bind
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit
from tqdm import tqdm

from protos.errors import Rejected
from protos.files import write_atomically
from sim_client.seeds import CALIBRATED
from sim_client.workers import Partial, Record, episodes

LEAST_NOISE, MOST_NOISE = 0.05, 4.0
ROUNDS, EPISODES = 10, 60
"""All rounds count, each on scenes of its own: a rate of 40 % is met to 2 or 3 points."""
OFF = 0.05
"""A rate further from what was asked for than this is another kind of data."""
USUAL_SLOPE = 3.0
"""Of the success rate's log-odds over the noise's logarithm; what is assumed before the first rounds say better."""


def calibrate(
    make: Callable[[float], Callable[[int], Record]], folder: Path, target: float, workers: int
) -> tuple[float, float]:
    """(noise, its success rate), as near to `target` as noise can make it, from a logistic curve over all rounds.

    `make(noise)(first_seed)` is a recorder. Each round is kept in `folder`: an interrupted collection goes on there.

    Raises Rejected where no noise comes near it.
    """
    kept = folder / "calibration.json"
    try:
        found = json.loads(kept.read_text()) if kept.exists() else {"tried": [], "successes": []}
        tried, successes = found["tried"], found["successes"]
    except (ValueError, KeyError, TypeError) as error:
        raise Rejected(str(kept), "what an interrupted calibration found", repr(error), "remove the folder") from error
    noise, success = _noise_for(target, tried, successes)
    done = len(tried)
    with tqdm(total=ROUNDS * EPISODES, initial=done * EPISODES, unit="episode", desc="calibrate the noise") as bar:
        for turn in range(done, ROUNDS):
            scratch = Partial(folder / f"noise{turn}", {"noise": noise})
            scenes = bind(make(noise), CALIBRATED + turn * EPISODES)
            tried.append(noise)
            successes.append(0)
            with contextlib.closing(episodes(scratch, scenes, workers)) as endless:  # type: ignore[type-var]
                for episode in islice(endless, EPISODES):
                    successes[-1] += episode.success
                    bar.update()
            bar.set_postfix_str(f"noise {noise:.2f}: {successes[-1] / EPISODES:.0%}")
            noise, success = _noise_for(target, tried, successes)
            write_atomically(kept, json.dumps({"tried": tried, "successes": successes}).encode())
            scratch.remove()
    if abs(success - target) > OFF:
        expected = f"{target:.0%} of its episodes to succeed"
        got = f"{success:.0%} at a noise of {noise:.2f}, where {LEAST_NOISE:g} to {MOST_NOISE:g} were possible"
        raise Rejected("--target-success", expected, got, "ask for another share, or say --noise")
    return noise, success


def _noise_for(target: float, tried: list[float], successes: list[int]) -> tuple[float, float]:
    """(noise, rate) where the most likely logistic curve meets `target`, within the range of noises. First a guess."""
    if not tried:
        return (LEAST_NOISE * MOST_NOISE) ** 0.5, target
    log_noise, wins = np.log(tried), np.array(successes)

    def rate(curve: NDArray[np.float64], at: Any) -> Any:
        level, log_slope = curve
        return expit(level - np.exp(log_slope) * at)

    def surprise(curve: NDArray[np.float64]) -> float:
        p = np.clip(rate(curve, log_noise), 1e-6, 1 - 1e-6)
        likelihood = (wins * np.log(p) + (EPISODES - wins) * np.log1p(-p)).sum()
        return float(-likelihood + (curve[1] - np.log(USUAL_SLOPE)) ** 2)

    curve = minimize(surprise, np.array([0.0, np.log(USUAL_SLOPE)]), method="Nelder-Mead").x
    log_found = (curve[0] - logit(np.clip(target, 1e-3, 1 - 1e-3))) / np.exp(curve[1])
    found = float(np.exp(np.clip(log_found, np.log(LEAST_NOISE), np.log(MOST_NOISE))))
    return found, float(rate(curve, np.log(found)))
