"""Episodes that differ in all that a format could lose, and a dataset of them."""

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from protos.spaces import ACTION, ObservationSpec, PolicySpec
from sim_client import store
from sim_client.episodes import Episode
from sim_client.store import About

REPOSITORY = Path(__file__).parents[3]
SPEC = PolicySpec(ObservationSpec(height=16, width=16), ACTION)
ABOUT = About(
    spec=SPEC,
    task="reach",
    behavior="mixed",
    dataset_id="equiserve/reach/mixed-v3",
    env_spec=EnvSpec("equiserve/Reach-v0", entry_point="nowhere:Reach").to_json(),
    notes={"seed": 7, "text": "größer"},
)


def episode(index: int, *, colour: bool = False) -> Episode:
    """2 to 6 steps. Even ones succeed, odd ones are cut off; every third has no seed."""
    rng, steps = np.random.default_rng(index), 2 + index % 5
    depth = rng.uniform(0, 0.6, (steps + 1, *SPEC.observation.shape)).astype(np.float32)
    depth[0, 0, :3] = 0.0, 1e-45, 0.6  # the smallest float32 there is: it must survive
    gripper = rng.integers(0, 2, (steps + 1, 1)).astype(np.float32)
    gripper[-1] = 1
    action = SPEC.action.project(rng.uniform(-1, 1, (steps, 5)).astype(np.float32) * [1, 0.05, 0.05, 0.05, 0.78])
    reward = np.zeros(steps, np.float32)
    reward[-1] = index % 2 == 0
    return Episode(
        depth=depth,
        gripper=gripper,
        action=np.clip(action, [0, -1, -1, -1, -1], 1).astype(np.float32),
        reward=reward,
        terminated=index % 2 == 0,
        truncated=index % 2 == 1,
        seed=None if index % 3 == 2 else 1_000_000_000 + index,
        behavior="expert" if index % 2 == 0 else "random",
        rgb=rng.integers(0, 256, (steps + 1, *SPEC.observation.shape, 3)).astype(np.uint8) if colour else None,
    )


def minari(path: Path, count: int = 5, *, colour: bool = False) -> Path:
    store.write(path, (episode(i, colour=colour) for i in range(count)), ABOUT)
    return path


def npz_arrays(count: int = 3) -> dict[str, NDArray[Any]]:
    """What docs/data.md tells people to write."""
    made = [episode(i) for i in range(count)]
    return {
        "depth": np.concatenate([e.depth for e in made]),
        "gripper": np.concatenate([e.gripper[:, 0] for e in made]),
        "action": np.concatenate([e.action for e in made]),
        "reward": np.concatenate([e.reward for e in made]),
        "episode_lengths": np.array([len(e) for e in made]),
        "terminated": np.array([e.terminated for e in made]),
        "truncated": np.array([e.truncated for e in made]),
        "contract": np.array(SPEC.to_json()),
    }


def assert_same(left: list[Episode], right: list[Episode]) -> None:
    """Every value, bit for bit."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in ("depth", "gripper", "action", "reward", "rgb"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None), name
            if a is not None:
                assert a.dtype == b.dtype
                assert a.shape == b.shape
                assert a.tobytes() == b.tobytes(), name
        for name in ("terminated", "truncated", "seed", "behavior"):
            assert getattr(one, name) == getattr(other, name), name
