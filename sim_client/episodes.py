"""An episode, and what it must satisfy to be one: numpy arrays checked against the contract."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import Rejected, shown
from protos.spaces import PolicySpec

OUTSIDE = 1e-5
"""Float32 actions may exceed a bound by this share of it."""


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode of T steps.

    Attributes:
        depth: float32 [T + 1, H, W] metres; the last frame is where the episode ended.
        gripper: float32 [T + 1, 1].
        action: float32 [T, A] physical units.
        reward: float32 [T]
        terminated, truncated: how the last step ended.
        seed: what the environment was reset with, if there was one.
        behavior: who acted.
        rgb: uint8 [T + 1, H, W, 3] where the view has colour, else None. Policies do not see it.
    """

    depth: NDArray[np.float32]
    gripper: NDArray[np.float32]
    action: NDArray[np.float32]
    reward: NDArray[np.float32]
    terminated: bool
    truncated: bool
    seed: int | None = None
    behavior: str = "unknown"
    rgb: NDArray[np.uint8] | None = None

    @property
    def success(self) -> bool:
        return bool(self.reward[-1] > 0)

    def __len__(self) -> int:
        return len(self.action)

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def cut(self, length: int) -> "Episode":
        """At most the first `length` steps; an episode that loses its end was truncated, not terminated."""
        if len(self) <= length:
            return self
        return replace(
            self,
            depth=self.depth[: length + 1],
            gripper=self.gripper[: length + 1],
            action=self.action[:length],
            reward=self.reward[:length],
            terminated=False,
            truncated=True,
            rgb=None if self.rgb is None else self.rgb[: length + 1],
        )


def check(episode: Episode, spec: PolicySpec, where: str) -> Episode:
    """`episode` with float32 arrays. Raises Rejected naming step and field of the first thing that breaks `spec`."""
    steps, view = len(episode.action), spec.observation
    if steps == 0:
        raise Rejected(where, "at least one step", "none", "remove the empty episode")
    if not episode.behavior.isprintable():
        raise Rejected(f"{where}, behavior", "a text without control characters", shown(episode.behavior))
    depth = _array(where, "depth", episode.depth, (steps + 1, *view.shape))
    low, high = np.float32(view.depth_min_m), np.float32(view.depth_max_m)
    _within(where, "depth", (depth >= low) & (depth <= high), depth, f"{low:g} to {high:g} m")
    gripper = _array(where, "gripper", episode.gripper, (steps + 1, 1))
    _within(where, "gripper", (gripper >= 0) & (gripper <= 1), gripper, f"0 to 1 ({view.gripper})")
    action = _array(where, "action", episode.action, (steps, spec.action.size))
    for i, f in enumerate(spec.action.fields):
        inside = spec.action.magnitudes(action)[:, i] <= 1 + OUTSIDE
        bound = f"|{f.name}| <= {f.limit:g}" if f.limit else f"{f.low:g} to {f.high:g}"
        _within(where, f"action.{f.name}", inside, action[:, spec.action.slice_of(f.name)], f"{bound} {f.unit}")
    reward = _array(where, "reward", episode.reward, (steps,))
    if episode.rgb is not None and (episode.rgb.shape != (steps + 1, *view.shape, 3) or episode.rgb.dtype != np.uint8):
        expected = f"uint8 of shape {(steps + 1, *view.shape, 3)}"
        raise Rejected(f"{where}, rgb", expected, f"{episode.rgb.dtype} of shape {episode.rgb.shape}")
    return replace(episode, depth=depth, gripper=gripper, action=action, reward=reward)


def _array(where: str, name: str, values: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(values)
    if array.shape != shape:
        raise Rejected(f"{where}, {name}", f"shape {shape}", f"shape {array.shape}")
    if not np.issubdtype(array.dtype, np.floating):
        raise Rejected(f"{where}, {name}", "float32 in the contract's unit", str(array.dtype))
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    _within(where, name, np.isfinite(narrow), array, "finite numbers, as float32")
    return narrow


def _within(where: str, name: str, good: NDArray[np.bool_], array: NDArray[np.floating], expected: str) -> None:
    if not good.all():
        step = int(np.argwhere(~good)[0][0])
        seen = array[step]
        got = f"{seen.min():g} to {seen.max():g}" if seen.size > 2 else str(seen)
        raise Rejected(f"{where}, step {step}, {name}", expected, got)
