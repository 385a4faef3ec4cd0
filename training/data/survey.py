"""What a dataset holds, counted in one pass: for `inspect`, and for what `validate` finds suspicious."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protos.spaces import GripperState, Kind, PolicySpec
from sim_client.episodes import Episode

SECTORS = 8
BINS = 20
STILL = 0.02
"""A planar motion shorter than this share of the longest has no direction worth counting."""
TIMID = 0.1
"""Planar motions that are all shorter than this share of their bound were bounded too loosely."""
HOLES = 1e-3
"""From this share of all pixels on, those at the smallest depth are worth a word."""
SECTOR_SHARE = 0.01
"""A sector counts as covered if at least this share of the motions points into it."""


@dataclass
class Survey:
    """Counts over all episodes.

    Attributes:
        histograms: per field of the action, how many steps fall into each of BINS equal bins of its range: magnitude
            over its bound for a vector, the normalised value for the others.
        still_cameras: episodes of more than one step whose frames are all the same.
        paid_early: episodes with a reward before their last step.
        raw_bytes: of all arrays in memory.
    """

    spec: PolicySpec
    steps: int = 0
    lengths: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    behaviors: Counter[str] = field(default_factory=Counter)
    behavior_successes: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    still_cameras: list[int] = field(default_factory=list)
    paid_early: list[int] = field(default_factory=list)
    pixels: int = 0
    holes: int = 0
    gripper_low: float = 1.0
    gripper_high: float = 0.0
    any_motion: bool = False
    depth_low_m: float = np.inf
    depth_high_m: float = -np.inf
    raw_bytes: int = 0
    _planar: list[NDArray[np.float32]] = field(default_factory=list)
    """[steps, 2] of each episode, in units of the bound."""

    @classmethod
    def of(cls, spec: PolicySpec, episodes: Iterable[Episode]) -> "Survey":
        survey = cls(spec, histograms={f.name: np.zeros(BINS, np.int64) for f in spec.action.fields})
        for episode in episodes:
            survey.add(episode)
        return survey

    def add(self, episode: Episode) -> None:
        arrays = (episode.depth, episode.gripper, episode.action, episode.reward)
        self.raw_bytes += sum(a.nbytes for a in arrays) + (0 if episode.rgb is None else episode.rgb.nbytes)
        if len(episode) > 1 and (episode.depth == episode.depth[:1]).all():
            self.still_cameras.append(len(self.lengths))
        if (episode.reward[:-1] > 0).any():
            self.paid_early.append(len(self.lengths))
        self.pixels += episode.depth.size
        self.holes += int(np.count_nonzero(episode.depth <= self.spec.observation.depth_min_m))
        self.steps += len(episode)
        self.lengths.append(len(episode))
        self.returns.append(float(episode.reward.sum()))
        self.successes.append(episode.success)
        self.behaviors[episode.behavior] += 1
        self.behavior_successes[episode.behavior] += episode.success
        self.gripper_low = min(self.gripper_low, float(episode.gripper.min()))
        self.gripper_high = max(self.gripper_high, float(episode.gripper.max()))
        self.depth_low_m = min(self.depth_low_m, float(episode.depth.min()))
        self.depth_high_m = max(self.depth_high_m, float(episode.depth.max()))
        self._count(episode.action)

    def _count(self, action: NDArray[np.float32]) -> None:
        normalized, sizes = self.spec.action.normalize(action), self.spec.action.magnitudes(action)
        motion = [i for i, f in enumerate(self.spec.action.fields) if f.limit is not None]
        self.any_motion |= bool((sizes[:, motion] > 0).any())
        for i, f in enumerate(self.spec.action.fields):
            part = normalized[:, self.spec.action.slice_of(f.name)]
            values, low = (sizes[:, i], 0.0) if f.kind is Kind.VECTOR else (part[:, 0], -1.0)
            self.histograms[f.name] += np.histogram(np.clip(values, low, 1.0), BINS, (low, 1.0))[0]
            if f.kind is Kind.VECTOR:
                self._planar.append(part)

    @property
    def longest(self) -> float:
        """Of the planar motions, as a share of their bound."""
        return max((float(np.linalg.norm(part, axis=1).max(initial=0.0)) for part in self._planar), default=0.0)

    @property
    def sectors(self) -> NDArray[np.int64]:
        """How many planar motions point into each of SECTORS, the first from 0 to 45 degrees from +x."""
        planar = np.concatenate([np.zeros((0, 2), np.float32), *self._planar])
        moving = planar[np.linalg.norm(planar, axis=1) > STILL * self.longest]
        turn = np.arctan2(moving[:, 1], moving[:, 0]) % (2 * np.pi) / (2 * np.pi)
        return np.bincount((turn * SECTORS).astype(int) % SECTORS, minlength=SECTORS)

    @property
    def covered(self) -> int:
        """How many sectors planar motion points into."""
        sectors = self.sectors
        return int((sectors >= max(1.0, SECTOR_SHARE * sectors.sum())).sum())

    def warnings(self) -> list[str]:
        """What is legal but seldom meant."""
        said = []
        if self.still_cameras:
            said.append(f"the depth image never changes within {_episodes(self.still_cameras)}: dead camera?")
        if self.paid_early:
            said.append(
                f"a reward comes before the last step in {_episodes(self.paid_early)}: if that is success, what "
                "follows should have been cut off, or policies learn to dwell there"
            )
        if self.holes >= HOLES * self.pixels:
            said.append(
                f"{100 * self.holes / self.pixels:.1f} % of pixels read {self.spec.observation.depth_min_m:g} m, the "
                "nearest there is: holes of a camera? Servers warn of them, too; better fill them before the import"
            )
        if not any(self.successes):
            said.append("no episode succeeds: behaviour cloning has nothing to imitate, and no reward to learn from")
        if self.spec.observation.gripper is GripperState.OPEN_RATIO:  # 1 is wide open: many never are
            if self.gripper_low == self.gripper_high:
                said.append(f"the gripper's opening never changes (always {self.gripper_high:g}): is it recorded?")
        elif self.gripper_high < 1:
            said.append(
                f"the gripper's state never reaches 1 (at most {self.gripper_high:g}): does it ever hold something?"
            )
        if not self.any_motion:
            said.append("all motions are zero: is the action recorded in the unit of the contract?")
        elif self.covered < SECTORS / 2:
            said.append(
                f"planar motion covers {self.covered} of {SECTORS} sectors of the circle: is an axis missing? "
                "If not, let training turn the scenes (--augmentation so2)"
            )
        if 0 < self.longest < TIMID:
            said.append(
                f"planar motions use at most {100 * self.longest:.2g} % of their bound: lower action.planar.limit_m, "
                "or a network's smallest errors are as large as they are"
            )
        return said


def _episodes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:5])) + (" ..." if len(indices) > 5 else "")
    return f"{len(indices)} episodes ({shown})"
