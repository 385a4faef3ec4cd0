"""What the numbers of somebody else's dataset mean, and how they become the contract's."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from protos.errors import Rejected
from protos.spaces import PolicySpec
from sim_client.episodes import Episode
from training.data.formats.raw import Array, Misused, Raw, complete

ROUNDING = 1e-6
"""So far beyond a bound, in its unit, arithmetic may put a value that lies on it."""


@dataclass(frozen=True)
class Geometry:
    """The contract of the data, and the conversion to it; `geometry_file.read_geometry` makes one."""

    task: str
    spec: PolicySpec
    names: dict[str, str]
    """What the source calls depth, gripper, action, reward and done, where it has names of its own."""
    depth_slope: float
    depth_offset_m: float
    depth_missing: float | None
    """Of a pixel without depth; it becomes the contract's smallest, as in the simulator."""
    gripper_zero: float
    gripper_one: float
    columns: tuple[tuple[int, float, float], ...]
    """Per component of the contract: column of the source (-1: none), factor, and what is added then."""
    width: int
    success: str

    def episode(self, raw: Raw) -> Episode:
        """`raw` in the contract's units. Nothing is clipped but rounding. Raises Rejected naming what is missing or
        misshapen."""
        for name, values in (("depth", raw.depth), ("gripper", raw.gripper), ("action", raw.action)):
            if values.ndim == 0 or not values.size:
                raise Rejected(name, "at least one step", f"shape {values.shape}", "leave the empty episode out")
        if raw.action.ndim != 2 or raw.action.shape[1] != self.width:
            raise Rejected("action", f"shape [steps, {self.width}], as action.order says", f"shape {raw.action.shape}")
        depth = _numbers("depth", raw.depth)
        depth = depth.reshape([size for axis, size in enumerate(depth.shape) if axis == 0 or size != 1])
        gripper = _numbers("gripper", raw.gripper).reshape(len(raw.gripper), -1)
        if gripper.shape[1] != 1:
            raise Rejected("gripper", "one number per frame", f"{gripper.shape[1]} of them")
        action, view = _numbers("action", raw.action), self.spec.observation
        metres = self.depth_slope * depth + self.depth_offset_m
        if self.depth_missing is not None:
            missing = _held(self.depth_missing, raw.depth.dtype)
            metres[(depth == missing) | (np.isnan(depth) & np.isnan(missing))] = view.depth_min_m
        opened = (gripper - self.gripper_zero) / (self.gripper_one - self.gripper_zero)
        episode = Episode(
            depth=_rounded(metres, view.depth_min_m, view.depth_max_m),
            gripper=_rounded(opened, 0.0, 1.0),
            action=self._action(action),
            reward=np.zeros(len(action), np.float32),
            terminated=False,
            truncated=False,
            seed=raw.seed,
            behavior=raw.behavior,
        )
        return complete(self._ended(episode, raw))

    def _action(self, action: Array) -> Array:
        parts = [factor * action[:, c] + more if c >= 0 else np.zeros(len(action)) for c, factor, more in self.columns]
        return np.stack(parts, axis=1).astype(np.float32)

    def _ended(self, episode: Episode, raw: Raw) -> Episode:
        """With rewards and an end: whoever succeeds has terminated, unless the source says otherwise."""
        needed = {"reward": raw.reward, "done": raw.done, "all": np.zeros(0)}[self.success]
        if needed is None:
            raise Misused(self.success, f"in the source: success.from is {self.success!r}", "nothing")
        if self.success == "reward":
            reward = _numbers("reward", needed).reshape(-1).astype(np.float32)
            success = bool(len(reward) and reward[-1] > 0)
        else:
            done = needed.reshape(-1).astype(bool)
            if self.success == "done" and len(done) != len(episode):  # a shorter one would cut the episode
                raise Rejected("done", f"length {len(episode)}, one per action", str(len(done)))
            success = self.success == "all" or bool(done.any())
            if self.success == "done" and success and (end := int(np.argmax(done)) + 1) < len(episode):
                # robomimic goes on recording what is done already; how that ended is no matter
                episode, raw = episode.cut(end), replace(raw, terminated=None, truncated=None)
            reward = np.zeros(len(episode), np.float32)
            reward[-1:] = success
        terminated = success if raw.terminated is None else raw.terminated
        truncated = not terminated if raw.truncated is None else raw.truncated
        return replace(episode, reward=reward, terminated=terminated, truncated=truncated)


def _held(missing: float, dtype: np.dtype[Any]) -> float:
    """`missing` as an array of `dtype` has it: 65.535 is another number in float32. Raises Rejected where integers
    cannot have it: it would wrap around to a depth that was measured."""
    if np.issubdtype(dtype, np.integer):
        bounds = np.iinfo(dtype)
        if not (bounds.min <= missing <= bounds.max and missing == int(missing)):
            remedy = "correct it in the geometry file, or leave it out"
            raise Misused("depth.missing", f"a value that the source's {dtype} can hold", str(missing), remedy)
    return float(np.asarray(missing).astype(dtype))


def _rounded(values: Array, low: float, high: float) -> Array:
    """As float32; what arithmetic put a little beyond a bound lies on it."""
    inside = np.clip(values, low, high)
    return np.where(np.abs(values - inside) <= ROUNDING, inside, values).astype(np.float32)


def _numbers(name: str, values: Array) -> Array:
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool) or np.iscomplexobj(values):
        raise Rejected(name, "numbers", str(values.dtype))
    return values.astype(np.float64)
