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
    env_spec: str | None
    """JSON of the Gymnasium EnvSpec it was recorded in; None when there was no simulator."""
    episodes: int
    depth: Float[Tensor, "F 1 H W"]
    gripper: Float[Tensor, "F 1"]
    now: Int[Tensor, " T"]
    then: Int[Tensor, " T"]
    action: Float[Tensor, "T A"]
    """Normalised."""
    reward: Float[Tensor, " T"]
    """Of as many steps as there are between `now` and `then`, discounted."""
    discount: Float[Tensor, " T"]
    origin: Int[NDArray, "T 2"]
    """(episode, step) on disk."""

    def __len__(self) -> int:
        return len(self.action)

    def batch(self, index: Int[Tensor, " B"]) -> Batch:
        """The transitions at `index`."""
        now, then = self.now[index], self.then[index]
        return Batch(
            state=State(self.depth[now], self.gripper[now]),
            action=self.action[index],
            reward=self.reward[index],
            discount=self.discount[index],
            next_state=State(self.depth[then], self.gripper[then]),
        )

    def draw(
        self, size: int, generator: torch.Generator, weights: Float[Tensor, " T"] | None = None
    ) -> Int[Tensor, " B"]:
        """Indices of `size` transitions with replacement: uniform, or in proportion to `weights`, which lie on the
        generator's device."""
        if weights is None:
            index = torch.randint(len(self), (size,), generator=generator, device=generator.device)
        else:
            index = torch.multinomial(weights, size, replacement=True, generator=generator)
        return index.to(self.action.device)

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """The transitions that `draw` chooses."""
        return self.batch(self.draw(size, generator))

    def where(self, index: Int[Tensor, " B"]) -> list[tuple[int, int]]:
        """(episode, step) of each transition, as the dataset on disk numbers them."""
        return [(int(self.origin[i, 0]), int(self.origin[i, 1])) for i in index.tolist()]


def load(
    path: Path,
    *,
    successful_only: bool,
    discount: float = 0.99,
    n_step: int = 1,
    device: torch.device | None = None,
) -> Dataset:
    """Read a dataset that `sim_client.collect`, or anything that follows its schema, wrote to `path`.

    Args:
        successful_only: keep the episodes that end with a positive reward; behaviour cloning imitates no failure.
        discount: what a reward one step later is worth.
        n_step: how many steps of reward an update looks ahead before it trusts a value, fewer at an episode's end.

    Raises:
        Rejected: naming episode, step and field of the first thing that does not fit the contract in its metadata; or
            the memory that it does not fit in.
    """
    try:
        return _load(path, successful_only, discount, n_step, device or torch.device("cpu"))
    except torch.OutOfMemoryError as error:
        got = str(error).splitlines()[0]
        raise Rejected(str(path), f"a dataset that fits on {device}", got, "say --device cpu") from error
    except MemoryError as error:
        remedy = "train on a part of it (python -m training.data split), or where there is more"
        got = str(error).splitlines()[0] if str(error) else "no memory"
        raise Rejected(str(path), "a dataset that fits in memory, twice while it is read", got, remedy) from error


def _load(path: Path, successful_only: bool, discount: float, n_step: int, device: torch.device) -> Dataset:
    about = store.read_about(path)
    digest = hashlib.sha256(about.spec.digest.encode())
    episodes, origin = [], []
    for number, episode in enumerate(store.read(path)):
        arrays = _Arrays.of(episode, about.spec, discount, n_step)
        for array in (arrays.depth, arrays.gripper, arrays.action, episode.reward, [episode.terminated]):
            digest.update(np.ascontiguousarray(array).tobytes())
        if episode.success or not successful_only:
            episodes.append(arrays)
            origin += [(number, step) for step in range(len(episode))]
    if not episodes:
        kind = "successful episodes" if successful_only else "episodes"
        remedy = "collect more"
        if successful_only:
            remedy += "; or --failures keep, to learn from all of them, as where nobody recorded rewards"
        raise Rejected(str(path), f"at least one of its {kind}", "none", remedy)
    starts = np.cumsum([0] + [len(e.depth) for e in episodes[:-1]])

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(e, name) for e in episodes])).to(device)

    def frames(name: str) -> Tensor:
        indices = [start + getattr(e, name) for start, e in zip(starts, episodes, strict=True)]
        return torch.from_numpy(np.concatenate(indices)).to(device)

    return Dataset(
        spec=about.spec,
        task=about.task,
        dataset_id=about.dataset_id,
        sha256=digest.hexdigest(),
        env_spec=about.env_spec,
        episodes=len(episodes),
        depth=tensor("depth")[:, None],
        gripper=tensor("gripper"),
        now=frames("now"),
        then=frames("then"),
        action=tensor("action"),
        reward=tensor("reward"),
        discount=tensor("discount"),
        origin=np.array(origin),
    )


@dataclass(frozen=True)
class _Arrays:
    depth: NDArray[np.float32]  # [T + 1, H, W]
    gripper: NDArray[np.float32]  # [T + 1, 1]
    now: NDArray[np.int64]  # [T]
    then: NDArray[np.int64]  # [T]
    action: NDArray[np.float32]  # [T, A] normalised
    reward: NDArray[np.float32]  # [T]
    discount: NDArray[np.float32]  # [T]

    @classmethod
    def of(cls, episode: Episode, spec: PolicySpec, discount: float, n_step: int) -> "_Arrays":
        end = len(episode)
        now = np.arange(end)
        then = np.minimum(now + n_step, end)
        reward: NDArray[np.float64] = np.zeros(end)
        for ahead in reversed(range(min(n_step, end))):  # r_t + gamma (r_t+1 + gamma (...)), 0 beyond the end
            there = np.concatenate([episode.reward[ahead:], np.zeros(ahead)])
            reward = there + discount * reward
        ended = (then == end) & episode.terminated
        return cls(
            depth=episode.depth,
            gripper=episode.gripper,
            now=now,
            then=then,
            action=np.asarray(spec.action.normalize(episode.action), np.float32),
            reward=reward.astype(np.float32),
            discount=np.where(ended, 0.0, discount ** (then - now)).astype(np.float32),
        )
