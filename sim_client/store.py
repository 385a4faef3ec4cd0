"""Episodes on disk: the one place that knows how a Minari dataset of ours is written and read. Needs no PyBullet."""

import errno
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gymnasium.error import Error as GymError
from gymnasium.spaces import Box, Dict

from protos.errors import Rejected
from protos.files import require_room, whole
from protos.spaces import ActionSpec, ObservationSpec, PolicySpec
from sim_client.episodes import Episode, check

UNREADABLE = frozenset((errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EMFILE, errno.ENFILE))
COMPRESS_FROM_BYTES = 1024
"""Arrays with larger frames are compressed, a frame to a chunk."""
MOST_RAW = 2
"""How often an episode's bytes Minari may write: it leaves the choice of chunks to HDF5, which fills up the last. In
measurements it was 1.4 times at most."""


@dataclass(frozen=True)
class About:
    """What a dataset says of itself."""

    spec: PolicySpec
    """What the numbers mean."""
    task: str
    behavior: str
    """Who acted, as `collect --behavior` spells it, or where the data were imported from."""
    dataset_id: str = "equiserve/episodes-v0"
    """Minari's name for it."""
    env_spec: str | None = None
    """JSON of the Gymnasium EnvSpec it was recorded in; None when there was no simulator."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Anything else that JSON can hold, e.g. the seed of collection."""

    def __post_init__(self) -> None:
        """Raises Rejected where a policy that is trained on it could not say so."""
        for name in ("task", "dataset_id"):
            text = getattr(self, name)
            if not text or not text.isprintable():  # half a surrogate pair is neither
                raise Rejected(name, "printable text, for policies to be known by", ascii(text))


def dataset_id(task: str, made_by: str) -> str:
    """Minari's name for the episodes of a task."""
    return f"equiserve/{task.replace('_', '-')}/{made_by}-v0"


def write(path: Path, episodes: Iterable[Episode], about: About) -> None:
    """Write a Minari dataset to `path`, whole or not at all; `MinariDataset(path / "data")` opens it.

    Episodes are taken one by one and may come from a generator. Frames are stored losslessly and compressed.

    Raises:
        FileExistsError: `path` exists.
        Rejected: naming the episode, step and field that do not fit `about.spec`.
        OSError: the disk is full, or will be, or is not ours to write on; `path` is not made.
    """
    with whole(path) as made:
        (made / "data").mkdir(parents=True)
        _write_minari(made / "data", episodes, about)
        _compress(made / "data" / "main_data.hdf5")


def _write_minari(folder: Path, episodes: Iterable[Episode], about: About) -> None:
    from importlib.metadata import version

    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    remaining = iter(episodes)
    first = next(remaining, None)
    if first is None:
        raise Rejected(about.dataset_id, "at least one episode", "none")
    require_room(folder, MOST_RAW * first.nbytes, "write episode 0")  # before HDF5 begins its file
    storage = MinariStorage.new(
        folder,
        observation_space=observation_space(about.spec.observation, rgb=first.rgb is not None),
        action_space=action_space(about.spec.action),
        data_format="hdf5",
        jpeg_encoding=False,  # lossy otherwise
    )
    metadata: dict[str, Any] = {
        "dataset_id": about.dataset_id,
        "minari_version": version("minari"),
        "algorithm_name": about.behavior,
        "author": {"equiserve"},
        "author_email": {"none"},
        "code_permalink": "none",
        "description": f"{about.task}, {about.behavior}",
        "requirements": ["equiserve[sim]"],
        "task": about.task,
        "behavior": about.behavior,
        "contract": about.spec.to_json(),
        "contract_digest": about.spec.digest,
        "notes": json.dumps(about.notes, sort_keys=True),
    }
    if about.env_spec is not None:
        metadata |= {"env_spec": about.env_spec, "eval_env_spec": about.env_spec}
    storage.update_metadata(metadata)

    behaviors: list[str] = []

    def buffers() -> Iterator[Any]:
        for index, given in enumerate(_chained(first, remaining)):
            episode = check(given, about.spec, f"episode {index}")
            if (episode.rgb is None) != (first.rgb is None):
                raise Rejected(f"episode {index}, rgb", "in every episode or in none", "in some")
            require_room(folder, MOST_RAW * episode.nbytes, f"write episode {index}")
            behaviors.append(episode.behavior)
            frames: dict[str, Any] = {"depth": episode.depth, "gripper": episode.gripper}
            if episode.rgb is not None:
                frames["rgb"] = episode.rgb
            before = [False] * (len(episode) - 1)
            yield EpisodeBuffer(
                id=index,
                seed=episode.seed,
                observations=frames,
                actions=episode.action,
                rewards=episode.reward,
                terminations=[*before, episode.terminated],
                truncations=[*before, episode.truncated],
            )

    storage.update_episodes(buffers())
    storage.update_episode_metadata([{"behavior": behavior} for behavior in behaviors])


def _chained(first: Episode, others: Iterator[Episode]) -> Iterator[Episode]:
    yield first
    yield from others


def observation_space(view: ObservationSpec, *, rgb: bool) -> Dict:
    """Of one observation, with a colour image beside the depth if `rgb`."""
    space: dict[str, Any] = {
        "depth": Box(view.depth_min_m, view.depth_max_m, view.shape, np.float32),
        "gripper": Box(0.0, 1.0, (1,), np.float32),
    }
    if rgb:
        space["rgb"] = Box(0, 255, (*view.shape, 3), np.uint8)
    return Dict(space)


def action_space(spec: ActionSpec) -> Box:
    """The smallest box around all actions of `spec`, physical units. A vector field's own bound is a disc within it."""
    return Box(spec.centre - spec.scale, spec.centre + spec.scale, dtype=np.float32)


def _compress(path: Path) -> None:
    """Rewrite an HDF5 file with its images compressed without loss. Minari itself writes them raw."""
    packed = path.with_suffix(".packed")
    require_room(path.parent, path.stat().st_size, "compress the data")
    with h5py.File(path, "r") as source, h5py.File(packed, "w", track_order=True) as target:

        def copy(name: str, node: Any) -> None:
            if isinstance(node, h5py.Group):
                made: Any = target.create_group(name, track_order=True)
            else:
                frame_bytes = node.dtype.itemsize * int(np.prod(node.shape[1:]))
                how: dict[str, Any] = {}
                if frame_bytes >= COMPRESS_FROM_BYTES:
                    how = {"chunks": (1, *node.shape[1:]), "compression": "gzip", "compression_opts": 4}
                    how["shuffle"] = True
                made = target.create_dataset(name, data=node[()], maxshape=(None, *node.shape[1:]), **how)
            made.attrs.update(node.attrs)

        source.visititems(copy)
        target.attrs.update(source.attrs)
    packed.replace(path)


def read_about(path: Path) -> About:
    """What the dataset at `path` says of itself. Raises Rejected naming the file and the entry that is wrong."""
    metadata = _open(path).storage.metadata
    spec = _contract(metadata, path)
    try:
        notes = json.loads(metadata.get("notes", "{}"))
    except (ValueError, TypeError) as error:
        raise Rejected(f"{path}, metadata.notes", "JSON of an object, as text", repr(error)) from error
    if not isinstance(notes, dict):
        raise Rejected(f"{path}, metadata.notes", "JSON of an object, as text", f"that of a {type(notes).__name__}")
    try:
        return About(
            spec=spec,
            task=str(metadata.get("task", "unknown")),
            behavior=str(metadata.get("behavior", "unknown")),
            dataset_id=str(metadata["dataset_id"]),
            env_spec=metadata.get("env_spec"),
            notes=notes,
        )
    except Rejected as error:
        raise error.within(f"{path}, metadata.") from error


def read(path: Path) -> Iterator[Episode]:
    """The episodes of the dataset at `path`, each checked against the contract in its metadata.

    Raises:
        Rejected: naming the file, and the episode, step and field of the first thing that is wrong.
    """
    spec, stored = read_about(path).spec, _open(path)
    index = 0
    try:
        _require_all(path, stored.total_episodes)
        metadata = stored.storage.get_episode_metadata(range(stored.total_episodes))
        for raw, told in zip(stored.iterate_episodes(), metadata, strict=True):
            try:
                yield _parse(raw, told, spec, f"episode {index}")
            except Rejected as error:
                raise error.within(f"{path}, ") from error
            index += 1
    except Rejected:
        raise
    except (OSError, KeyError, RuntimeError, AttributeError, AssertionError, TypeError, ValueError) as error:
        _raise_if_unreadable(error)
        # What h5py and Minari say of a file that is cut short, or lacks or misnames a group.
        got = f"{type(error).__name__}: {error}"
        remedy = "copy or collect it again"
        raise Rejected(f"{path}, episode {index}", "an undamaged main_data.hdf5", got, remedy) from error


def _require_all(path: Path, told: int) -> None:
    """Minari reads as many episodes as its metadata tells of: fewer than the file holds would go unseen."""
    with h5py.File((path / "data" if (path / "data").is_dir() else path) / "main_data.hdf5", "r") as file:
        held = sum(name.startswith("episode_") for name in file)
    if not held:
        raise Rejected(str(path), "at least one episode", "none", "collect or import it again")
    if held != told:
        raise Rejected(f"{path}, metadata.total_episodes", f"{held}, as main_data.hdf5 holds", str(told))


def _open(path: Path) -> Any:
    import minari

    folder = path / "data" if (path / "data").is_dir() else path
    if not folder.is_dir():
        got = "a file" if path.is_file() else "nothing there"
        remedy = "python -m " + ("training.data import" if path.is_file() else "sim_client.collect") + " makes one"
        raise Rejected(str(path), "a Minari dataset's directory", got, remedy)
    try:
        return minari.MinariDataset(folder)
    except (ValueError, OSError, KeyError, TypeError, AssertionError, AttributeError, ImportError, GymError) as error:
        _raise_if_unreadable(error)
        raise Rejected(
            str(path), "a Minari dataset", f"{type(error).__name__}: {error}", "collect or import it again"
        ) from error


def _raise_if_unreadable(error: Exception) -> None:
    """That a file may not be read now says nothing of what it holds."""
    if getattr(error, "errno", None) in UNREADABLE:
        raise error


def _contract(metadata: dict[str, Any], path: Path) -> PolicySpec:
    if "contract" not in metadata:
        raise Rejected(f"{path}, metadata.contract", "the JSON of a PolicySpec", "nothing", "say what the numbers mean")
    try:
        spec = PolicySpec.from_json(metadata["contract"])
    except Rejected as error:
        raise error.within(f"{path}, metadata.") from error
    if metadata.get("contract_digest") != spec.digest:
        raise Rejected(f"{path}, metadata.contract_digest", spec.digest, str(metadata.get("contract_digest")))
    return spec


def _parse(raw: Any, metadata: dict[str, Any], spec: PolicySpec, where: str) -> Episode:
    """What Minari read -> a checked episode."""
    frames = raw.observations
    if not isinstance(frames, dict) or not {"depth", "gripper"} <= frames.keys():
        got = sorted(frames) if isinstance(frames, dict) else type(frames).__name__
        raise Rejected(f"{where}, observations", "depth and gripper", str(got))
    steps = len(raw.actions)
    ended, cut = np.asarray(raw.terminations, bool), np.asarray(raw.truncations, bool)
    for name, flags in (("termination", ended), ("truncation", cut)):
        if flags.shape != (steps,):
            raise Rejected(f"{where}, {name}", f"shape ({steps},), one per action", f"shape {flags.shape}")
        if flags[:-1].any():
            raise Rejected(f"{where}, step {int(np.argmax(flags))}, {name}", "only at the last step", "before it")
    episode = Episode(
        depth=np.asarray(frames["depth"]),
        gripper=np.asarray(frames["gripper"]),
        action=np.asarray(raw.actions),
        reward=np.asarray(raw.rewards),
        terminated=bool(ended.any()),
        truncated=bool(cut.any()),
        seed=metadata.get("seed"),
        behavior=str(metadata.get("behavior", "unknown")),
        rgb=np.asarray(frames["rgb"]) if "rgb" in frames else None,
    )
    return check(episode, spec, where)
