"""robomimic's HDF5: a group per demonstration, and the frame after each action beside the frame before it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from protos.errors import Rejected
from protos.files import require_room, whole
from protos.spaces import PolicySpec
from sim_client.episodes import Episode
from sim_client.store import About
from training.data.formats.raw import Array, Raw, Source, about_from_json, about_to_json

NAMES = {"depth": "depth", "gripper": "gripper", "action": "actions", "reward": "rewards", "done": "dones"}
NAMES |= {"rgb": "rgb_image"}
"""Observation keys and datasets, unless a geometry file says otherwise."""
PHYSICAL = "actions_physical"
"""Ours: robomimic's `actions` lie in -1..1 by convention; here they are as the contract has them, bit for bit."""
GYM_TYPE = 2
"""robomimic.envs.env_base.EnvType.GYM_TYPE"""


def read(path: Path, names: Mapping[str, str]) -> Source:
    """The file at `path`; its filter keys (`mask/`) select nothing. Raises Rejected naming demonstration and key."""
    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("data"), h5py.Group):
                raise Rejected(f"{path}, data", "the group of the demonstrations", f"only {sorted(file)}")
            attributes = dict(file["data"].attrs)
            demos = sorted((name for name in file["data"] if name.startswith("demo")), key=_number)
    except OSError as error:
        raise Rejected(str(path), "an undamaged HDF5 file", str(error), "copy or write it again") from error
    if not demos:
        raise Rejected(f"{path}, data", "at least one demonstration", "none")
    about = None
    if "contract" in attributes:
        about = about_from_json(
            attributes["contract"], attributes.get("contract_digest"), attributes.get("about"), str(path)
        )
    return Source(about, _demos(path, demos, names, ours=about is not None))


def _number(name: str) -> tuple[int, str]:
    digits = name.removeprefix("demo_")
    return (int(digits) if digits.isdigit() else 0), name


def _demos(path: Path, demos: list[str], names: Mapping[str, str], *, ours: bool) -> Iterator[Raw]:
    for index, name in enumerate(demos):
        where = f"{path}, episode {index}"
        try:
            with h5py.File(path, "r") as file:
                raw = _demo(file["data"][name], names, ours)
        except Rejected as error:
            raise error.within(f"{where}, ") from error
        except (OSError, KeyError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise Rejected(where, f"an undamaged data/{name}", f"{type(error).__name__}: {error}") from error
        yield raw


def _demo(group: Any, names: Mapping[str, str], ours: bool) -> Raw:
    action_name = PHYSICAL if ours else names["action"]
    for needed in (action_name, "obs", f"obs/{names['depth']}", f"obs/{names['gripper']}"):
        if needed not in group:
            raise Rejected(needed, f"in {group.name}", f"only {sorted(group)}", "extract observations, or name the key")
    action = group[action_name][()]
    stated = group.attrs.get("num_samples")
    if stated is not None and int(stated) != len(action):
        raise Rejected("num_samples", f"{len(action)}, the number of actions", str(stated))

    def frames(name: str) -> Array:
        before = group[f"obs/{names[name]}"][()]
        after = group.get(f"next_obs/{names[name]}")
        if after is None:
            return before
        if len(after) != len(before):  # its last frame would be of another step
            raise Rejected(f"next_obs/{names[name]}", f"length {len(before)}, as obs has", str(len(after)))
        return np.concatenate([before, after[-1:]])

    def flag(name: str) -> bool | None:
        return bool(group.attrs[name]) if name in group.attrs else None

    done = group[names["done"]][()] if names["done"] in group else None
    if done is not None and len(done) != len(action):
        raise Rejected(names["done"], f"length {len(action)}, one per action", str(len(done)))
    depth = frames("depth")
    seed = group.attrs.get("seed")
    return Raw(
        depth=depth[..., 0] if ours else depth,
        gripper=frames("gripper"),
        action=action,
        reward=group[names["reward"]][()] if names["reward"] in group else None,
        done=done,
        terminated=flag("terminated"),
        truncated=flag("truncated"),
        seed=None if seed is None else int(seed),
        behavior=str(group.attrs.get("behavior", "unknown")),
        rgb=frames("rgb") if ours and f"obs/{names['rgb']}" in group else None,  # of foreign data nobody reads it
    )


def write(path: Path, episodes: Iterable[Episode], about: About) -> None:
    """One group per episode, written as it comes; whole or not at all."""
    with whole(path) as made:
        require_room(made.parent, 0, "begin")
        with h5py.File(made, "w") as file:
            data = file.create_group("data")
            total = 0
            for index, episode in enumerate(episodes):
                require_room(made.parent, 2 * episode.nbytes, f"write demo_{index}")  # obs, and next_obs beside it
                _write_demo(data.create_group(f"demo_{index}"), episode, about.spec)
                total += len(episode)
            data.attrs["total"] = total
            data.attrs["env_args"] = json.dumps(_env_args(about))
            data.attrs["contract"] = about.spec.to_json()
            data.attrs["contract_digest"] = about.spec.digest
            data.attrs["about"] = about_to_json(about)


def _write_demo(group: Any, episode: Episode, spec: PolicySpec) -> None:
    group.attrs["num_samples"] = len(episode)
    group.attrs["terminated"], group.attrs["truncated"] = episode.terminated, episode.truncated
    group.attrs["behavior"] = episode.behavior
    if episode.seed is not None:
        group.attrs["seed"] = episode.seed
    group["actions"] = spec.action.normalize(episode.action).astype(np.float32)
    group[PHYSICAL] = episode.action
    group["rewards"] = episode.reward
    group["dones"] = np.array([0] * (len(episode) - 1) + [int(episode.terminated)], np.int64)
    group["states"] = np.zeros((len(episode), 0))  # robomimic plays MuJoCo states back; there are none
    frames: dict[str, Array] = {NAMES["depth"]: episode.depth[..., None], NAMES["gripper"]: episode.gripper}
    if episode.rgb is not None:
        frames[NAMES["rgb"]] = episode.rgb
    for name, values in frames.items():
        for folder, part in (("obs", values[:-1]), ("next_obs", values[1:])):
            chunk = (1, *values.shape[1:])
            group.create_dataset(f"{folder}/{name}", data=part, chunks=chunk, compression="gzip", shuffle=True)


def _env_args(about: About) -> dict[str, Any]:
    name = json.loads(about.env_spec)["id"] if about.env_spec else about.task
    return {"env_name": name, "env_type": GYM_TYPE, "type": GYM_TYPE, "env_kwargs": {}}
