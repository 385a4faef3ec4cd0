"""Domain randomisation: what differs from episode to episode besides where things are. All off unless asked for."""

import dataclasses
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.spaces import ObservationSpec
from sim_client.objects import Traits


@dataclass(frozen=True)
class Randomization:
    """How far the world may differ. Each episode draws anew, from the episode's own seed."""

    friction: float = 0.0
    """Of all objects: a factor within 1 plus or minus this."""
    mass: float = 0.0
    """Of all objects: a factor within 1 plus or minus this."""
    size: float = 0.0
    """Of all objects: a factor within 1 plus or minus this; an open gripper still fits around a block up to 0.3."""
    depth_noise_m: float = 0.0
    """Standard deviation of a pixel's depth at 0.5 m; a depth camera's error grows with the distance squared."""
    missing_pixels: float = 0.0
    """Share of pixels without depth, which read 0, as a real camera's do; at edges they are ten times as likely."""
    latency_s: float = 0.0
    """The robot acts on a command this late, at most: uniform per episode."""
    camera_error_m: float = 0.0
    """Standard deviation per axis of where the camera really is."""
    camera_error_rad: float = 0.0
    """Standard deviation of the camera's heading; the side view's camera goes around the workspace by it."""
    distractors: int = 0
    """Small things on the table that have nothing to do with the task."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            top = {"friction": 0.9, "mass": 0.9, "size": 0.3, "missing_pixels": 0.5, "latency_s": 0.2, "distractors": 8}
            if not 0 <= value <= top.get(f.name, sys.float_info.max):
                expected = f"between 0 and {top[f.name]}" if f.name in top else "finite and not negative"
                raise ValueError(f"randomize.{f.name} must be {expected}, got {value}")

    @property
    def of_objects(self) -> bool:
        """Whether the objects themselves differ between episodes."""
        return bool(self.friction or self.mass or self.size)

    def traits(self, rng: np.random.Generator) -> Traits:
        """What this episode's objects are like."""
        return Traits(
            friction=rng.uniform(1 - self.friction, 1 + self.friction),
            mass=rng.uniform(1 - self.mass, 1 + self.mass),
            size=rng.uniform(1 - self.size, 1 + self.size),
        )

    def degrade(
        self, depth: NDArray[np.float32], view: ObservationSpec, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """A depth image as a real camera would have taken it: float32 [H, W], metres, within the spec's range."""
        edge = np.hypot(*np.gradient(depth)) > 0.01  # before there is noise, which has edges everywhere
        if self.depth_noise_m:
            spread = self.depth_noise_m * (depth / 0.5) ** 2
            depth = depth + (spread * rng.standard_normal(depth.shape)).astype(np.float32)
        if self.missing_pixels:
            along = min(1.0, 10 * self.missing_pixels / np.where(edge, 10.0, 1.0).mean())
            elsewhere = (self.missing_pixels - along * edge.mean()) / max(1 - edge.mean(), 1e-6)
            lost = rng.uniform(size=depth.shape) < np.where(edge, along, elsewhere)
            depth = np.where(lost, np.float32(view.depth_min_m), depth)
        return np.clip(depth, view.depth_min_m, view.depth_max_m).astype(np.float32)


@dataclass(frozen=True)
class Misplacement:
    """Where the camera really is, seen from where it is believed to be: metres and radians."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    yaw: float = 0.0

    @classmethod
    def drawn(cls, how: Randomization, rng: np.random.Generator) -> "Misplacement":
        x, y, z = how.camera_error_m * rng.standard_normal(3)
        return cls(x, y, z, how.camera_error_rad * rng.standard_normal())
