"""A small real dataset: a target lies somewhere around the tool, the expert moves towards it. Learnable in seconds."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from protos.spaces import ACTION, ObservationSpec, PolicySpec
from training.data.dataset import Dataset, load
from training.networks.family import NetworkConfig

SMALL = PolicySpec(ObservationSpec(height=32, width=32), ACTION)
NETWORK = NetworkConfig(fields=(4, 8, 8), hidden=8, pool=2)
"""32 x 32 pixels pooled to 16 x 16: three convolutions."""


def reach_episode(rng: np.random.Generator, spec: PolicySpec, steps: int = 4) -> dict[str, Any]:
    """The expert closes in on a box; p says whether it holds, which it reads off the gripper state."""
    target = rng.uniform(-0.15, 0.15, 2)
    depth, gripper, action = [], [], []
    for step in range(steps + 1):
        frame = np.full(spec.observation.shape, 0.3, np.float32)
        row, col = np.round(spec.observation.pixel_of(target)).astype(int)
        frame[max(row - 2, 0) : row + 3, max(col - 2, 0) : col + 3] = 0.2
        holds = float(rng.integers(2))
        depth.append(frame)
        gripper.append(np.array([holds], np.float32))
        if step < steps:
            move = spec.action.project(np.array([1 - holds, *target, 0.02, 0.1], np.float32))
            action.append(move)
            target = target - move[spec.action.slice_of("planar")]
    return {"depth": depth, "gripper": gripper, "action": action}


def write_dataset(
    path: Path,
    spec: PolicySpec = SMALL,
    episodes: int = 12,
    edit: Callable[[int, dict[str, Any]], None] | None = None,
    metadata: dict[str, Any] | None = None,
    reward: Callable[[int], float] = lambda episode: 1.0,
) -> Path:
    """A Minari dataset at `path`; `edit(index, episode)` may break an episode before it is written."""
    import minari
    from gymnasium.spaces import Box, Dict
    from minari.data_collector import EpisodeBuffer

    os.environ["MINARI_DATASETS_PATH"] = str(path)
    rng, buffers = np.random.default_rng(0), []
    for index in range(episodes):
        made = reach_episode(rng, spec)
        made |= {"reward": [0.0] * (len(made["action"]) - 1) + [reward(index)]}
        if edit:
            edit(index, made)
        steps = len(made["action"])
        buffers.append(
            EpisodeBuffer(
                id=index,
                observations={"depth": made["depth"], "gripper": made["gripper"]},
                actions=made["action"],
                rewards=made["reward"],
                terminations=made.get("termination", [False] * (steps - 1) + [True]),
                truncations=[False] * steps,
            )
        )
    first = buffers[0].observations["depth"][0]  # type: ignore[index, call-overload]
    space = Dict({"depth": Box(0, 1000, first.shape, first.dtype), "gripper": Box(-np.inf, np.inf, (1,))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = minari.create_dataset_from_buffers(
            "equiserve/reach/expert-v0",
            buffers,
            observation_space=space,
            action_space=Box(-np.inf, np.inf, buffers[0].actions[0].shape),  # type: ignore[index]
            jpeg_encoding=False,
        )
    contract = {"task": "reach", "contract": spec.to_json(), "contract_digest": spec.digest}
    dataset.storage.update_metadata(contract if metadata is None else metadata)
    return path / "equiserve" / "reach" / "expert-v0"


@pytest.fixture(scope="session")
def reach_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("reach"))


@pytest.fixture(scope="session")
def reach(reach_path: Path) -> Dataset:
    return load(reach_path, successful_only=True)


def set_apart(target: nn.Module) -> None:
    """Give a target, which starts as a copy, weights of its own, so that confusing two networks shows."""
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(1.1)


def leave_out_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` ends before its export, which takes longer than a small run."""
    monkeypatch.setattr("training.run._export", lambda run, *_: run.config.output / "policy.onnx")


@pytest.fixture
def without_export(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_the_export(monkeypatch)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _settings_kept() -> Iterator[None]:
    """A command that a test runs in this process sets how many threads torch takes, and what training logs."""
    threads, log = torch.get_num_threads(), logging.getLogger("training")
    level = log.level
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)
