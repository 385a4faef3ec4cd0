"""Two datasets out of one, and one out of several: whole episodes, none of them twice."""

import hashlib
import itertools
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from protos.errors import Rejected
from protos.files import require_absent
from sim_client.episodes import Episode
from sim_client.store import About, dataset_id
from training.data.convert import convert, open_dataset


@dataclass(frozen=True)
class Split:
    """Divide a dataset in two, by whole episodes drawn at random, with the same share of successes in both.

    Example: python -m training.data split runs/drawer100 --output-a runs/train --output-b runs/held_out
    """

    path: tyro.conf.Positional[Path]
    """The dataset."""
    output_a: Path
    """Gets --share of the episodes; must not exist."""
    output_b: Path
    """Gets the others; must not exist."""
    share: float = 0.9
    """How much of the successes, and of the failures, goes to --output-a."""
    seed: int = 0
    """Of the draw. The same seed gives the same division."""

    def run(self) -> int:
        if not 0 < self.share < 1:
            raise Rejected("--share", "a share between 0 and 1", str(self.share))
        a, b = self.output_a.resolve(), self.output_b.resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise Rejected("--output-b", "another place than --output-a, neither within the other", str(self.output_b))
        for output in (self.output_a, self.output_b):
            require_absent(output)
        about, episodes = open_dataset(self.path)
        first = draw([episode.success for episode in episodes], self.share, self.seed)
        notes = about.notes | {"split": {"of": about.dataset_id, "share": self.share, "seed": self.seed}}

        def write(output: Path, *, wanted: bool) -> None:
            part = (e for e, is_first in zip(open_dataset(self.path)[1], first, strict=True) if is_first is wanted)
            convert(output, "minari", replace(about, notes=notes), part)

        write(self.output_a, wanted=True)
        try:
            write(self.output_b, wanted=False)
        except BaseException:
            shutil.rmtree(self.output_a, ignore_errors=True)  # it is ours, and in the way of the next attempt
            raise
        return 0


def draw(successes: list[bool], share: float, seed: int) -> list[bool]:
    """Which episodes belong to the first part: `share` of the successes and of the failures, rounded, but of two or
    more at least one in each part.

    Raises Rejected when a part would be empty.
    """
    of = {outcome: [i for i, success in enumerate(successes) if success is outcome] for outcome in (True, False)}
    counts = {outcome: round(share * len(indices)) for outcome, indices in of.items()}
    counts |= {outcome: min(max(counts[outcome], 1), len(of[outcome]) - 1) for outcome in of if len(of[outcome]) > 1}
    if (first := sum(counts.values())) in (0, len(successes)):
        raise Rejected("--share", "at least one episode in each part", f"{first} of {len(successes)} in the first")
    generator, chosen = random.Random(seed), set[int]()
    for outcome, indices in of.items():
        chosen |= set(generator.sample(indices, counts[outcome]))
    return [i in chosen for i in range(len(successes))]


@dataclass(frozen=True)
class Merge:
    """Join datasets of one task and one contract, as of several days, or of demonstrations and what a policy then did.

    An episode that was there before is left out: it would count twice.

    Example: python -m training.data merge runs/monday runs/tuesday --output runs/both
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """The datasets, two or more."""
    output: Path
    """Where to; must not exist."""

    def run(self) -> int:
        if len(self.paths) < 2:
            raise Rejected("PATHS", "two datasets or more", str(len(self.paths)))
        require_absent(self.output)
        opened = [open_dataset(path) for path in self.paths]
        parts = [about for about, _ in opened]
        about = joined(self.paths, parts)
        again = 0

        def episodes() -> Iterator[Episode]:
            nonlocal again
            seen = set[bytes]()
            for episode in itertools.chain.from_iterable(part for _, part in opened):
                known = _digest(episode)
                again += known in seen
                if known not in seen:
                    seen.add(known)
                    yield episode

        convert(self.output, "minari", about, episodes())
        if again:
            print(f"warning: left out: {again} of the episodes, as they were there before", file=sys.stderr)
        return 0


def joined(paths: Sequence[Path], parts: Sequence[About]) -> About:
    """What datasets of one contract and one task say of themselves together.

    Raises:
        Rejected: naming the first dataset that is of another, and how.
    """
    first = parts[0]
    for path, part in zip(paths[1:], parts[1:], strict=True):
        first.spec.require_same(part.spec, str(path))
        if part.task != first.task:
            raise Rejected(f"{path}, task", f"{first.task}, as of {paths[0]}", part.task)
    worlds = {part.env_spec for part in parts if part.env_spec is not None}
    return About(
        spec=first.spec,
        task=first.task,
        behavior=", ".join(dict.fromkeys(part.behavior for part in parts)),
        dataset_id=dataset_id(first.task, "merged"),
        env_spec=worlds.pop() if len(worlds) == 1 else None,
        notes={"merged": [{"of": part.dataset_id, **part.notes} for part in parts]},
    )


def _digest(episode: Episode) -> bytes:
    """Of what it shows and does, and whether it terminated."""
    digest = hashlib.sha256()
    for array in (episode.depth, episode.gripper, episode.action, episode.reward, [episode.terminated]):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
