"""Datasets on disk: look at them, check them, convert them, divide and join them. `python -m training.data --help`."""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from protos.errors import Rejected
from protos.files import require_writable
from protos.spaces import PolicySpec
from serving.errors import PolicyRefused
from sim_client.episodes import Episode
from training.data.convert import Foreign, Importable, convert, detect, open_dataset
from training.data.formats.flight import Choice, read_labels
from training.data.formats.raw import Misused
from training.data.geometry import Geometry
from training.data.geometry_file import read_geometry
from training.data.regroup import Merge, Split
from training.data.survey import Survey

BROKEN, REFUSED = 1, 2
SHOWN_EPISODES = 6


@dataclass(frozen=True)
class Validate:
    """Check every value of a dataset against its contract, and name the first bad episode, step and field.

    Reads Minari directories, and npz, robomimic and LeRobot datasets. Exit code 0: good (what is legal but suspicious
    is a warning on stderr); 1: broken; 2: the command itself could not be carried out.

    Example: python -m training.data validate runs/drawer20
    """

    path: tyro.conf.Positional[Path]
    """The dataset."""
    contract: Path | None = None
    """That the data must have: of another dataset's directory, of a policy.onnx, or JSON as PolicySpec.to_json writes
    it. Left out: the dataset's own."""
    geometry: Path | None = None
    """What the numbers of foreign data mean (docs/camera.toml); only for data that carry no contract."""

    def run(self) -> int:
        wanted = None if self.contract is None else _contract(self.contract)
        geometry, kind = _geometry(self.geometry), detect(self.path)
        try:
            about, episodes = open_dataset(self.path, kind, geometry)
            if wanted is not None:
                wanted.require_same(about.spec, str(self.path))
            survey = Survey.of(about.spec, episodes)
        except Misused:  # nothing is said against the data
            raise
        except Rejected as error:
            where = "" if str(self.path) in error.field else f"{self.path}, "
            print(f"broken: {where}{error}", file=sys.stderr)
            return BROKEN
        for warning in survey.warnings():
            print(f"warning: {self.path}: {warning}", file=sys.stderr)
        print(
            f"{self.path}: good; {len(survey.lengths)} episodes, {survey.steps} transitions, "
            f"{sum(survey.successes)} successful, contract {about.spec.digest[:16]}"
        )
        return 0


@dataclass(frozen=True)
class Inspect:
    """Say what a dataset holds: counts, lengths, returns, actions, the directions of motion, its size on disk.

    Example: python -m training.data inspect runs/drawer20 --html runs/drawer20.html
    """

    path: tyro.conf.Positional[Path]
    """The dataset, in any format that `import` reads."""
    geometry: Path | None = None
    """What the numbers of foreign data mean (docs/camera.toml); only for data that carry no contract."""
    html: Path | None = None
    """Also write a page with charts and depth filmstrips, one self-contained file."""

    def run(self) -> int:
        from training.data.page import text, write_page  # matplotlib takes as long to load as all the rest

        if self.html is not None:
            require_writable(self.html)
        about, episodes = open_dataset(self.path, geometry=_geometry(self.geometry))
        kept: list[Episode] = []
        survey = Survey.of(about.spec, _keep_first(episodes, kept))
        files = [self.path] if self.path.is_file() else [f for f in self.path.rglob("*") if f.is_file()]
        disk_bytes = sum(f.stat().st_size for f in files)
        print(text(self.path, about, survey, disk_bytes))
        if self.html is not None:
            write_page(self.html, self.path, about, survey, disk_bytes, kept)
            print(self.html)
        return 0


def _keep_first(episodes: Iterator[Episode], kept: list[Episode]) -> Iterator[Episode]:
    for episode in episodes:
        if len(kept) < SHOWN_EPISODES:
            kept.append(episode)
        yield episode


@dataclass(frozen=True)
class Export:
    """Write a dataset in another format. The contract travels along, so that `import` gives back every value.

    Example: python -m training.data export runs/drawer20 --format robomimic --output runs/drawer20.hdf5
    """

    path: tyro.conf.Positional[Path]
    """The dataset, a directory that sim_client.collect or `import` made."""
    format: Foreign
    """npz and robomimic are one file, lerobot is a directory (LeRobotDataset v3.0). See docs/data.md."""
    output: Path
    """Where to; must not exist."""

    def run(self) -> int:
        about, episodes = open_dataset(self.path, "minari")
        return convert(self.output, self.format, about, episodes)


@dataclass(frozen=True)
class Import:
    """Make a dataset to train from out of npz, robomimic or LeRobot data, or out of what a server recorded.

    Every value is checked against the contract. Data that `export` wrote, and flight recordings, need no geometry. For
    data from elsewhere --geometry says what the numbers mean.

    Example: python -m training.data import lab.npz --geometry camera.toml --output runs/lab
    """

    source: tyro.conf.Positional[Path]
    """A .npz file, a robomimic .hdf5 file, a LeRobotDataset's directory (v3.0 or v2.1), or what serving.server --record
    wrote: a folder or one .mcap file."""
    output: Path
    """Directory of the new Minari dataset; must not exist."""
    format: Importable | None = None
    """Left out: by the source's name and files."""
    geometry: Path | None = None
    """The view, the units and the names of the source, as docs/camera.toml explains them."""
    labels: Path | None = None
    """Of a flight recording: a TOML file with a line EPISODE_ID = true or false for each success or failure. It counts
    more than what EndEpisode said."""
    unlabelled: Literal["refuse", "skip", "failure"] = "refuse"
    """Of a flight recording: what to do with episodes of which neither says how they went."""
    policy: str = ""
    """Of a flight recording: only the episodes in which the policy of this name acted."""

    def run(self) -> int:
        kind = self.format or detect(self.source)
        if kind == "minari":
            raise Rejected(
                str(self.source),
                "an npz, robomimic or LeRobot dataset or a flight recording",
                "a directory without meta/info.json and .mcap files",
            )
        about, episodes = open_dataset(self.source, kind, _geometry(self.geometry), self._choice(kind))
        return convert(self.output, "minari", about, episodes)

    def _choice(self, kind: str) -> Choice:
        choice = Choice({} if self.labels is None else read_labels(self.labels), self.unlabelled, self.policy)
        if kind != "flight" and choice != Choice():
            flags = "--labels, --unlabelled, --policy"
            raise Rejected(flags, f"nothing: {self.source} is no flight recording", "a value", "leave them out")
        return choice


def _contract(path: Path) -> PolicySpec:
    try:
        if path.suffix == ".onnx":
            from serving.policy import load

            return load(path).spec
        return open_dataset(path)[0].spec if path.is_dir() else PolicySpec.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(f"--contract {path}", "JSON, a dataset's directory or a policy.onnx", str(error)) from error
    except PolicyRefused as error:
        raise error.reasons[0].within(f"--contract {path}, ") from error
    except Rejected as error:
        raise Rejected(f"--contract {path}", error.expected, error.got, error.remedy) from error


def _geometry(path: Path | None) -> Geometry | None:
    return None if path is None else read_geometry(path)


Command = (
    Annotated[Validate, tyro.conf.subcommand("validate")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Split, tyro.conf.subcommand("split")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
)


def main(argv: list[str] | None = None) -> int:
    command = tyro.cli(Command, args=argv, prog="python -m training.data", description=__doc__)
    try:
        return int(command.run())
    except (Rejected, OSError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted: what was not finished was not written", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, what was begun is cleared up
    sys.exit(main())
