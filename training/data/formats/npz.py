"""Plain numpy: one .npz file whose arrays hold all episodes end to end. docs/data.md describes it for people."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from protos.errors import Rejected
from protos.files import whole
from sim_client.episodes import Episode
from sim_client.store import About
from training.data.formats.raw import Array, Raw, Source, about_from_json, about_to_json

NAMES = {"depth": "depth", "gripper": "gripper", "action": "action", "reward": "reward", "done": "done", "rgb": "rgb"}
"""What the arrays are called, unless a geometry file says otherwise."""
PER_EPISODE = frozenset(("terminated", "truncated", "seed", "behavior"))
NO_SEED = -1


def read(path: Path, names: Mapping[str, str]) -> Source:
    """The file at `path`. Raises Rejected naming the array that is missing or does not fit the others."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        remedy = "save arrays of numbers and text, never objects" if "pickle" in str(error) else "write it again"
        raise Rejected(str(path), "an undamaged .npz file", f"{type(error).__name__}: {error}", remedy) from error
    about = None
    if "contract" in arrays:
        about = about_from_json(_text(arrays["contract"]), *_own_words(arrays), str(path))
    lengths = _lengths(path, arrays)
    names = NAMES if about else names
    if about is None:  # colour is for our own data: nobody reads it where a geometry file says what a view is
        arrays.pop(names["rgb"], None)
    _require_lengths(path, arrays, names, lengths)
    return Source(about, _episodes(arrays, names, lengths))


def _text(array: Array) -> str:
    return str(array.item()) if array.size == 1 else ""


def _own_words(arrays: Mapping[str, Array]) -> tuple[str | None, str | None]:
    digest, about = (_text(arrays[name]) if name in arrays else None for name in ("contract_digest", "about"))
    return digest, about


def _lengths(path: Path, arrays: Mapping[str, Array]) -> Array:
    if "episode_lengths" not in arrays:
        raise Rejected(f"{path}, episode_lengths", "the number of actions of each episode", "nothing")
    lengths = arrays["episode_lengths"]
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise Rejected(f"{path}, episode_lengths", "integers [episodes]", f"{lengths.dtype} of shape {lengths.shape}")
    if len(lengths) == 0:
        raise Rejected(f"{path}, episode_lengths", "at least one episode", "none")
    if (lengths < 1).any():
        empty = int(np.argmax(lengths < 1))
        raise Rejected(
            f"{path}, episode {empty}, episode_lengths", "at least one step", str(lengths[empty]), "leave it out"
        )
    return lengths.astype(int)


def _require_lengths(path: Path, arrays: Mapping[str, Array], names: Mapping[str, str], lengths: Array) -> None:
    steps, episodes = int(lengths.sum()), len(lengths)
    frames = f"{steps + episodes}, one per action and one after the last of each episode"
    expected = {names["depth"]: (steps + episodes, frames), names["gripper"]: (steps + episodes, frames)}
    expected[names["action"]] = (steps, f"{steps}, the sum of episode_lengths")
    optional = {names["rgb"]: expected[names["depth"]]}
    optional |= {names[name]: expected[names["action"]] for name in ("reward", "done")}
    per_episode = (episodes, f"{episodes}, one per episode")
    optional |= dict.fromkeys(PER_EPISODE, per_episode)
    for name, (length, meaning) in (expected | optional).items():
        if name in arrays and (arrays[name].ndim == 0 or len(arrays[name]) != length):
            raise Rejected(f"{path}, {name}", f"length {meaning}", f"shape {arrays[name].shape}")
        if name in expected and name not in arrays:
            raise Rejected(f"{path}, {name}", f"an array of length {meaning}", f"only {sorted(arrays)}")
    for name in PER_EPISODE & arrays.keys():
        if arrays[name].ndim != 1:
            raise Rejected(f"{path}, {name}", f"shape [{episodes}]", f"shape {arrays[name].shape}")
    if "seed" in arrays and not np.issubdtype(arrays["seed"].dtype, np.integer):
        raise Rejected(f"{path}, seed", f"integers, {NO_SEED} for none", str(arrays["seed"].dtype))
    for name in ("terminated", "truncated"):
        if name in arrays and not np.isin(arrays[name], (0, 1)).all():  # bool("False") is true, and of a NaN, too
            raise Rejected(f"{path}, {name}", "bool, of each episode", f"{arrays[name].dtype}, e.g. {arrays[name][0]}")


def _episodes(arrays: Mapping[str, Array], names: Mapping[str, str], lengths: Array) -> Iterator[Raw]:
    step = 0
    for index, length in enumerate(lengths):
        frames, steps = slice(step + index, step + index + length + 1), slice(step, step + length)

        def part(name: str, where: slice) -> Array | None:
            return arrays[names[name]][where] if names[name] in arrays else None

        def one(name: str) -> Any:
            return arrays[name][index].item() if name in arrays else None  # noqa: B023  called before the next turn

        ended, cut, seed, behavior = one("terminated"), one("truncated"), one("seed"), one("behavior")
        yield Raw(
            depth=arrays[names["depth"]][frames],
            gripper=arrays[names["gripper"]][frames],
            action=arrays[names["action"]][steps],
            reward=part("reward", steps),
            done=part("done", steps),
            terminated=None if ended is None else bool(ended),
            truncated=None if cut is None else bool(cut),
            seed=None if seed is None or seed == NO_SEED else int(seed),
            behavior="unknown" if behavior is None else str(behavior),
            rgb=part("rgb", frames),
        )
        step += length


def write(path: Path, episodes: Iterable[Episode], about: About) -> None:
    """All episodes in one file, whole or not at all. The format asks for all of them in memory at once."""
    together = list(episodes)
    arrays = {name: np.concatenate([getattr(e, name) for e in together]) for name in _PER_FRAME_OR_STEP}
    if together[0].rgb is not None:
        arrays["rgb"] = np.concatenate([e.rgb for e in together if e.rgb is not None])
    arrays |= {
        "episode_lengths": np.array([len(e) for e in together], np.int64),
        "terminated": np.array([e.terminated for e in together]),
        "truncated": np.array([e.truncated for e in together]),
        "seed": np.array([NO_SEED if e.seed is None else e.seed for e in together], np.int64),
        "behavior": np.array([e.behavior for e in together]),
        "contract": np.array(about.spec.to_json()),
        "contract_digest": np.array(about.spec.digest),
        "about": np.array(about_to_json(about)),
    }
    with whole(path) as made, made.open("wb") as file:
        np.savez_compressed(file, **arrays)


_PER_FRAME_OR_STEP = ("depth", "gripper", "action", "reward")
