"""A Minari dataset as tensors on one device, checked once at the door."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from protos.errors import Rejected
from protos.spaces import PolicySpec
from sim_client import store
from sim_client.episodes import Episode
from training.batch import Batch, State


@dataclass(frozen=True)
class Dataset:
    """All transitions of a dataset on one device. Frames are stored once and indexed as s and as s'."""

    spec: PolicySpec
    task: str
    dataset_id: str
    sha256: str
    """Of every array's content, so that the same episodes have the same hash whatever wrote the file."""
    episodes: int
    depth: Float[Tensor, "F 1 H W"]
    gripper: Float[Tensor, "F 1"]
    now: Int[Tensor, " T"]
    then: Int[Tensor, " T"]
    action: Float[Tensor, "T A"]
    """Normalised."""
    reward: Float[Tensor, " T"]
    continues: Float[Tensor, " T"]

    def __len__(self) -> int:
        return len(self.action)

    def batch(self, index: Int[Tensor, " B"]) -> Batch:
        """The transitions at `index`."""
        now, then = self.now[index], self.then[index]
        return Batch(
            state=State(self.depth[now], self.gripper[now]),
            action=self.action[index],
            reward=self.reward[index],
            continues=self.continues[index],
            next_state=State(self.depth[then], self.gripper[then]),
        )

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """`size` transitions, uniform with replacement."""
        index = torch.randint(len(self), (size,), generator=generator, device=generator.device)
        return self.batch(index.to(self.action.device))


def load(path: Path, *, successful_only: bool, device: torch.device | None = None) -> Dataset:
    """Read a dataset that `sim_client.collect`, or anything that follows its schema, wrote to `path`.

    Args:
        successful_only: keep the episodes that end with a positive reward; behaviour cloning imitates no failure.

    Raises:
        Rejected: naming episode, step and field of the first thing that does not fit the contract in its metadata.
    """
    about = store.read_about(path)
    digest = hashlib.sha256(about.spec.digest.encode())
    episodes = []
    for episode in store.read(path):
        arrays = _Arrays.of(episode, about.spec)
        for array in (arrays.depth, arrays.gripper, arrays.action, arrays.reward, arrays.continues):
            digest.update(np.ascontiguousarray(array).tobytes())
        if episode.success or not successful_only:
            episodes.append(arrays)
    if not episodes:
        kind = "successful episodes" if successful_only else "episodes"
        raise Rejected(str(path), f"at least one of its {kind}", "none", "collect more, or use --algo iql")
    starts = np.cumsum([0] + [len(e.depth) for e in episodes[:-1]])
    steps = [start + np.arange(len(e.action)) for start, e in zip(starts, episodes, strict=True)]

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(e, name) for e in episodes])).to(device)

    now = torch.from_numpy(np.concatenate(steps)).to(device)
    return Dataset(
        spec=about.spec,
        task=about.task,
        dataset_id=about.dataset_id,
        sha256=digest.hexdigest(),
        episodes=len(episodes),
        depth=tensor("depth")[:, None],
        gripper=tensor("gripper"),
        now=now,
        then=now + 1,
        action=tensor("action"),
        reward=tensor("reward"),
        continues=tensor("continues"),
    )


@dataclass(frozen=True)
class _Arrays:
    depth: NDArray[np.float32]  # [T + 1, H, W]
    gripper: NDArray[np.float32]  # [T + 1, 1]
    action: NDArray[np.float32]  # [T, A] normalised
    reward: NDArray[np.float32]  # [T]
    continues: NDArray[np.float32]  # [T]

    @classmethod
    def of(cls, episode: Episode, spec: PolicySpec) -> "_Arrays":
        normalized = np.asarray(spec.action.normalize(episode.action), np.float32)
        continues = np.ones(len(episode), np.float32)
        continues[-1] = not episode.terminated
        return cls(episode.depth, episode.gripper, normalized, episode.reward, continues)
