"""A Minari dataset as tensors on one device, checked once at the door."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from protos.errors import Rejected
from protos.spaces import PolicySpec
from training.batch import Batch, State

OUTSIDE = 1e-5
"""Float32 actions may exceed a bound by this share of it."""


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
    stored = _open(path)
    metadata = stored.storage.metadata
    spec = _contract(metadata)
    digest = hashlib.sha256(spec.digest.encode())
    episodes = []
    for episode in _episodes(stored, path):
        checked = _Episode.checked(episode, spec)
        for array in (checked.depth, checked.gripper, checked.action, checked.reward, checked.continues):
            digest.update(np.ascontiguousarray(array).tobytes())
        if checked.reward[-1] > 0 or not successful_only:
            episodes.append(checked)
    if not episodes:
        kind = "successful episodes" if successful_only else "episodes"
        raise Rejected(str(path), f"at least one of its {kind}", "none", "collect more, or use --algo iql")
    starts = np.cumsum([0] + [len(e.depth) for e in episodes[:-1]])
    steps = [start + np.arange(len(e.action)) for start, e in zip(starts, episodes, strict=True)]

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(e, name) for e in episodes])).to(device)

    now = torch.from_numpy(np.concatenate(steps)).to(device)
    return Dataset(
        spec=spec,
        task=str(metadata.get("task", "unknown")),
        dataset_id=str(metadata["dataset_id"]),
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
class _Episode:
    depth: NDArray[np.float32]  # [T + 1, H, W]
    gripper: NDArray[np.float32]  # [T + 1, 1]
    action: NDArray[np.float32]  # [T, A] normalised
    reward: NDArray[np.float32]  # [T]
    continues: NDArray[np.float32]  # [T]

    @classmethod
    def checked(cls, episode: Any, spec: PolicySpec) -> "_Episode":
        where = f"episode {episode.id}"
        steps = len(episode.actions)
        if steps == 0:
            raise Rejected(where, "at least one step", "none", "remove the empty episode")
        if not isinstance(episode.observations, dict) or not {"depth", "gripper"} <= episode.observations.keys():
            raise Rejected(f"{where}, observations", "a dict with depth and gripper", str(type(episode.observations)))
        view = spec.observation
        depth = _array(where, "depth", episode.observations["depth"], (steps + 1, *view.shape))
        low, high = np.float32(view.depth_min_m), np.float32(view.depth_max_m)
        _within(where, "depth", (depth >= low) & (depth <= high), depth, f"{low:g} to {high:g} m")
        gripper = _array(where, "gripper", episode.observations["gripper"], (steps + 1, 1))
        _within(where, "gripper", (gripper >= 0) & (gripper <= 1), gripper, f"0 to 1 ({view.gripper})")
        action = _array(where, "action", episode.actions, (steps, spec.action.size))
        for i, field in enumerate(spec.action.fields):
            inside = spec.action.magnitudes(action)[:, i] <= 1 + OUTSIDE
            of_field = action[:, spec.action.slice_of(field.name)]
            bound = f"|{field.name}| <= {field.limit:g}" if field.limit else f"{field.low:g} to {field.high:g}"
            _within(where, f"action.{field.name}", inside, of_field, f"{bound} {field.unit}")
        reward = _array(where, "reward", episode.rewards, (steps,))
        normalized = np.asarray(spec.action.normalize(action), np.float32)
        ended = np.asarray(episode.terminations, bool)
        if ended[:-1].any():
            step = int(np.argmax(ended))
            raise Rejected(f"{where}, step {step}, termination", "only at the last step", "before it")
        return cls(depth, gripper, normalized, reward, (~ended).astype(np.float32))


def _open(path: Path) -> Any:
    import minari

    folder = path / "data" if (path / "data").is_dir() else path
    if not folder.is_dir():
        raise Rejected(
            str(path), "a Minari dataset's directory", "nothing there", "python -m sim_client.collect makes one"
        )
    try:
        return minari.MinariDataset(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise Rejected(str(path), "a Minari dataset", repr(error), "collect or import it again") from error


def _episodes(stored: Any, path: Path) -> Iterator[Any]:
    try:
        yield from stored.iterate_episodes()
    except (OSError, KeyError) as error:  # what h5py says of a file that is cut short or lacks a group
        raise Rejected(str(path), "an undamaged main_data.hdf5", repr(error), "copy or collect it again") from error


def _contract(metadata: dict[str, Any]) -> PolicySpec:
    if "contract" not in metadata:
        raise Rejected("metadata.contract", "the JSON of a PolicySpec", "nothing", "say what the numbers mean")
    spec = PolicySpec.from_json(metadata["contract"])
    if metadata.get("contract_digest") != spec.digest:
        raise Rejected("metadata.contract_digest", spec.digest, str(metadata.get("contract_digest")))
    return spec


def _array(where: str, name: str, values: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(values)
    if array.shape != shape:
        raise Rejected(f"{where}, {name}", f"shape {shape}", f"shape {array.shape}")
    if not np.issubdtype(array.dtype, np.floating):
        raise Rejected(f"{where}, {name}", "float32 in the contract's unit", str(array.dtype))
    _within(where, name, np.isfinite(array), array, "finite numbers")
    return array.astype(np.float32)


def _within(where: str, name: str, good: NDArray[np.bool_], array: NDArray[np.floating], expected: str) -> None:
    if not good.all():
        step = int(np.argwhere(~good)[0][0])
        seen = array[step]
        got = f"{seen.min():g} to {seen.max():g}" if seen.size > 2 else str(seen)
        raise Rejected(f"{where}, step {step}, {name}", expected, got)
