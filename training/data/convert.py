"""Datasets of any format, opened and written. A format is a module in `formats` of two functions, read(path, names)
and write(path, episodes, about), and the names it gives to things; it is imported when it is used. Flight recordings
are read alone."""

import importlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from protos.errors import Rejected
from serving.flight import SUFFIX
from sim_client import store
from sim_client.episodes import Episode, check
from sim_client.store import About
from training.data.formats import flight
from training.data.formats.raw import Misused, Raw, own
from training.data.geometry import Geometry

log = logging.getLogger(__name__)

Foreign = Literal["npz", "robomimic", "lerobot"]
"""What is read and written."""
Importable = Foreign | Literal["flight"]
MINARI = ("data/metadata.json", "data/main_data.hdf5", "metadata.json", "main_data.hdf5")
"""A directory with any of these is a dataset, if perhaps a broken one."""


def detect(path: Path) -> Literal["minari"] | Importable:
    """The format of what lies at `path`, by its name and its files. Raises Rejected when it is none of ours."""
    formats = "a Minari or LeRobot directory, a .npz file, a robomimic .hdf5 file or a flight recording"
    if path.is_dir():
        if any(path.glob(f"*{SUFFIX}")):
            return "flight"
        if (path / "meta/info.json").exists():
            return "lerobot"
        if not any((path / name).exists() for name in MINARI):
            raise Rejected(str(path), formats, "a directory that is none of them")
        return "minari"
    if not path.exists():
        raise Rejected(str(path), "a dataset", "no such file or directory")
    if path.suffix == ".npz":
        return "npz"
    if path.suffix in (".hdf5", ".h5"):
        return "robomimic"
    if path.suffix == SUFFIX:
        return "flight"
    raise Rejected(str(path), formats, f"a file named *{path.suffix}", "rename it, or say --format")


def open_dataset(
    path: Path,
    kind: str | None = None,
    geometry: Geometry | None = None,
    choice: flight.Choice | None = None,
) -> tuple[About, Iterator[Episode]]:
    """What the dataset at `path` says of itself, and its episodes one by one, each checked against its contract.

    Args:
        kind: the format; found out when left out.
        geometry: what the numbers of a dataset mean that carries no contract.
        choice: of a flight recording: which episodes, and what is known of them beside it.

    Raises:
        Rejected: naming the file, and episode, step and field of the first thing that is wrong; also while iterating.
    """
    kind = kind or detect(path)
    if kind == "minari":
        if geometry is not None:
            raise _carries_its_contract(path)
        return store.read_about(path), store.read(path)
    if kind == "flight":
        source = flight.read(path, choice or flight.Choice())
    else:
        module = importlib.import_module(f"training.data.formats.{kind}")
        source = module.read(path, dict(module.NAMES) | (geometry.names if geometry else {}))
    if geometry is not None:
        if source.about is not None:
            raise _carries_its_contract(path)
        about = About(spec=geometry.spec, task=geometry.task, behavior="imported", dataset_id="equiserve/imported-v0")
        return about, _checked(path, source.episodes, about, geometry)
    if source.about is None:
        raise Misused(
            f"{path}, contract",
            "a contract in the file",
            "nothing",
            "say what its numbers mean when you `import` it: --geometry camera.toml",
        )
    return source.about, _checked(path, source.episodes, source.about, None)


def _carries_its_contract(path: Path) -> Misused:
    return Misused("--geometry", f"nothing: {path} carries its contract", "a geometry file", "leave it out")


def _checked(path: Path, episodes: Iterable[Raw], about: About, geometry: Geometry | None) -> Iterator[Episode]:
    successes = []
    for index, raw in enumerate(episodes):
        where = f"{path}, episode {index}"
        try:
            episode = geometry.episode(raw) if geometry else own(raw)
        except Rejected as error:
            raise error.within(f"{where}, ") from error
        if len(raw.action) == 1 and not len(episode):
            log.warning("%s: left out: its only action failed, and no frame shows what came of it", where)
            continue
        episode = check(episode, about.spec, where)
        successes.append(episode.success)
        yield episode
    if not successes:
        raise Rejected(str(path), "at least one episode with a whole transition", "none")
    if geometry and geometry.success == "done" and len(successes) > 1 and all(successes):
        log.warning(
            "%s: all %d episodes succeed, by their done flags: if those only mark where recordings end, as LeRobot's "
            'next.done usually does, failures are among them; then say success.from = "reward"',
            path,
            len(successes),
        )


def write_dataset(path: Path, kind: str, episodes: Iterable[Episode], about: About) -> None:
    """Write a dataset in the format `kind` to `path`, whole or not at all. Raises FileExistsError if `path` exists."""
    if kind == "minari":
        store.write(path, episodes, about)
    else:
        importlib.import_module(f"training.data.formats.{kind}").write(path, episodes, about)


def convert(output: Path, kind: str, about: About, episodes: Iterable[Episode]) -> int:
    """Write a dataset as `write_dataset` does and print what it holds; returns 0, for an exit code."""
    counted = {"episodes": 0, "transitions": 0, "successful": 0}

    def counting() -> Iterator[Episode]:
        for episode in episodes:
            counted["episodes"] += 1
            counted["transitions"] += len(episode)
            counted["successful"] += episode.success
            yield episode

    write_dataset(output, kind, counting(), about)
    print(f"{output}: " + ", ".join(f"{count} {name}" for name, count in counted.items()))
    return 0
