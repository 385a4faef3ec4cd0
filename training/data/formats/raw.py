"""What the formats have in common: an episode before its units are known, and what a file says of itself."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import Rejected
from protos.spaces import PolicySpec
from sim_client.episodes import Episode
from sim_client.store import About

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Raw:
    """One episode of T steps as a file has it.

    Attributes:
        depth, gripper: [T + 1, ...], or [T, ...] where the source has no frame after the last action.
        action: [T, ...]
        reward, done: [T], or None where the source has none.
        terminated, truncated: how it ended, or None where the source does not say.
    """

    depth: Array
    gripper: Array
    action: Array
    reward: Array | None
    done: Array | None = None
    terminated: bool | None = None
    truncated: bool | None = None
    seed: int | None = None
    behavior: str = "unknown"
    rgb: Array | None = None


class Misused(Rejected):
    """What a command's options say, or leave out, does not suit the data; the data themselves may be good."""


@dataclass(frozen=True)
class Source:
    """A file that is being read: what it says of itself, if it is ours, and its episodes."""

    about: About | None
    episodes: Iterable[Raw]


def own(raw: Raw) -> Episode:
    """An episode that was written in the units of the contract: every value as it is. Raises Rejected on a gap."""
    if raw.reward is None or raw.terminated is None or raw.truncated is None:
        missing = [name for name in ("reward", "terminated", "truncated") if getattr(raw, name) is None]
        raise Rejected(missing[0], "one per step" if missing[0] == "reward" else "one per episode", "nothing")
    gripper = raw.gripper[:, None] if raw.gripper.ndim == 1 else raw.gripper
    episode = Episode(
        raw.depth, gripper, raw.action, raw.reward, raw.terminated, raw.truncated, raw.seed, raw.behavior, raw.rgb
    )
    return complete(episode)


def complete(episode: Episode) -> Episode:
    """An episode whose source has no frame after the last action, as one that has T + 1 frames.

    After a termination nothing is learned from the next state: the last frame stands in for it. After a truncation it
    is bootstrapped from, and no frame may be made up: the last action is dropped.
    """
    steps = len(episode)
    if steps == 0 or len(episode.depth) != steps or len(episode.gripper) != steps:
        return episode
    if not episode.terminated:
        return replace(episode, action=episode.action[:-1], reward=episode.reward[:-1])
    rgb = None if episode.rgb is None else _last_again(episode.rgb)
    return replace(episode, depth=_last_again(episode.depth), gripper=_last_again(episode.gripper), rgb=rgb)


def _last_again(frames: Array) -> Array:
    return np.concatenate([frames, frames[-1:]])


def about_to_json(about: About) -> str:
    """Everything but the contract, which travels beside it."""
    told = {name: getattr(about, name) for name in ("task", "behavior", "dataset_id", "env_spec", "notes")}
    return json.dumps(told, sort_keys=True)


def about_from_json(contract: str, digest: str | None, text: str | None, where: str) -> About:
    """What a file says of itself. `digest` and `text` may be absent. Raises Rejected naming `where` and the entry."""
    try:
        spec = PolicySpec.from_json(contract)
    except Rejected as error:
        raise error.within(f"{where}, ") from error
    if digest is not None and digest != spec.digest:
        raise Rejected(f"{where}, contract_digest", spec.digest, digest, "the contract was edited after it was written")
    try:
        told = json.loads(text) if text else {}
        return About(
            spec=spec,
            task=str(told.get("task", "unknown")),
            behavior=str(told.get("behavior", "unknown")),
            dataset_id=str(told.get("dataset_id", "equiserve/imported-v0")),
            env_spec=told.get("env_spec"),
            notes=dict(told.get("notes", {})),
        )
    except Rejected as error:
        raise error.within(f"{where}, ") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise Rejected(f"{where}, about", "a JSON object", repr(error)) from error
