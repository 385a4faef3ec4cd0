"""LeRobotDataset: one row per action in parquet files, metadata beside them. Writes v3.0, reads v3.0 and v2.1.

It has no place for the frame after an episode's last action. Ours travels in columns of our own in `meta/episodes`,
which other readers pass over; of anybody else's data, see `raw.complete`.
"""

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protos.errors import Rejected
from protos.files import whole
from sim_client.episodes import Episode
from sim_client.store import About
from training.data.formats.lerobot_meta import (
    DATA_PATH,
    FPS,
    NAMES,
    OURS,
    Moments,
    features,
    list_of,
    numpy_of,
    row_of,
    write_meta,
)
from training.data.formats.raw import Array, Raw, Source, about_from_json, about_to_json

DATA_FILE_BYTES = 100 * 2**20
"""LeRobot's own limit of a data file."""


def read(path: Path, names: Mapping[str, str]) -> Source:
    """The dataset in the directory `path`. Raises Rejected naming the feature that is missing or cannot be read."""
    try:
        info = json.loads((path / "meta/info.json").read_text())
        told, version = dict(info["features"]), str(info["codebase_version"])
        about = _about(path)
        ours, names = (_our_columns(path), NAMES) if about else ({}, names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Rejected(f"{path}/meta", "a LeRobotDataset's metadata", f"{type(error).__name__}: {error}") from error
    if version not in ("v3.0", "v2.1"):
        raise Rejected(f"{path}/meta/info.json, codebase_version", "v3.0 or v2.1", version, "convert it with lerobot")
    for name in ("depth", "gripper", "action"):
        if names[name] not in told:
            raise Rejected(f"{path}, {names[name]}", "a feature of the dataset", f"only {sorted(told)}")
        feature = told[names[name]]
        if not isinstance(feature, dict) or "dtype" not in feature:
            raise Rejected(f"{path}/meta/info.json, {names[name]}", "a feature with its dtype", str(feature))
        if feature["dtype"] == "video":
            remedy = "lossy video is no depth in metres: record depth as an array or as 16-bit images"
            raise Rejected(f"{path}, {names[name]}", "an array or an image", "video", remedy)
    return Source(about, _checked(path, names, info, ours))


def _about(path: Path) -> About | None:
    file = path / "meta/equiserve.json"
    if not file.exists():
        return None
    told = json.loads(file.read_text())
    return about_from_json(told["contract"], told["contract_digest"], told["about"], str(file))


def _our_columns(path: Path) -> dict[int, dict[str, Any]]:
    """What we told of every episode, frames after the last action included; empty where another tool rewrote them."""
    rows: dict[int, dict[str, Any]] = {}
    for file in sorted((path / "meta/episodes").glob("*/*.parquet")):
        table = pq.read_table(file)
        mine = [name for name in table.column_names if name.startswith(OURS)]
        columns = {name.removeprefix(OURS): table.column(name) for name in mine}
        for row, index in enumerate(table.column("episode_index").to_pylist()):
            rows[index] = {name: column.slice(row, 1) for name, column in columns.items()}
    return rows


def _checked(path: Path, names: Mapping[str, str], info: dict[str, Any], ours: dict[int, Any]) -> Iterator[Raw]:
    count, tasks = 0, set[int]()
    try:
        for table in _tables(path):
            tasks |= _tasks_of(table)
            if len(tasks) > 1:
                remedy = "a policy learns one task: divide the dataset by task, and import the part that you mean"
                raise Rejected("task_index", "one task in all episodes", str(sorted(tasks)), remedy)
            yield _raw(table, names, ours.get(table.column("episode_index")[0].as_py()))
            count += 1
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        if isinstance(error, Rejected):
            raise error.within(f"{path}, episode {count}, ") from error
        raise Rejected(f"{path}, episode {count}", "undamaged parquet", f"{type(error).__name__}: {error}") from error
    if count != info.get("total_episodes", count):
        raise Rejected(
            f"{path}, total_episodes", f"{info['total_episodes']}, as meta/info.json says", f"{count} in data/"
        )


def _tables(path: Path) -> Iterator[pa.Table]:
    """The rows of one episode after another, a row group in memory at a time."""
    pending: pa.Table | None = None
    files = sorted((path / "data").glob("*/*.parquet"))
    if not files:
        raise Rejected("data", "parquet files", "none")
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group)
                pending = table if pending is None else pa.concat_tables([pending, table])
                index = pending.column("episode_index").to_numpy()
                starts = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist()]
                for start, end in itertools.pairwise(starts):
                    yield pending.slice(start, end - start)
                pending = pending.slice(starts[-1])
    if pending is not None and len(pending):
        yield pending


def _tasks_of(table: pa.Table) -> set[int]:
    if "task_index" not in table.column_names:
        return set()
    return set(np.unique(numpy_of(table.column("task_index"))).tolist())


def _raw(table: pa.Table, names: Mapping[str, str], ours: dict[str, Any] | None) -> Raw:
    order = table.column("frame_index").to_numpy()
    if not np.array_equal(order, np.arange(len(order))):
        raise Rejected("frame_index", "0, 1, 2 ...", f"{order[:5].tolist()} ...", "an episode is cut or shuffled")

    def frames(name: str) -> Array | None:
        if names[name] not in table.column_names:
            return None
        before = _frames(table.column(names[name]))
        if ours is None or name not in ours:
            return before
        after = numpy_of(ours[name]).reshape(1, *before.shape[1:])
        return np.concatenate([before, after])

    def column(name: str) -> Array | None:
        return numpy_of(table.column(names[name])) if names[name] in table.column_names else None

    def told(name: str) -> Any:
        return ours[name][0].as_py() if ours is not None and name in ours else None

    depth, gripper, action = frames("depth"), frames("gripper"), column("action")
    if depth is None or gripper is None or action is None:
        raise Rejected(names["depth"], "depth, gripper and action in data/", f"only {table.column_names}")
    behavior = told("behavior")
    return Raw(
        depth=depth,
        gripper=gripper,
        action=action,
        reward=column("reward"),
        done=column("done"),
        terminated=told("terminated"),
        truncated=told("truncated"),
        seed=told("seed"),
        behavior="unknown" if behavior is None else behavior,
        rgb=None if ours is None else frames("rgb"),  # of foreign data nobody reads it
    )


def _frames(column: Any) -> Array:
    if not pa.types.is_struct(column.type):
        return numpy_of(column)
    from PIL import Image

    files = column.combine_chunks().field("bytes").to_pylist()  # LeRobot's images: the bytes of a PNG or a TIFF
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files])


def write(path: Path, episodes: Iterable[Episode], about: About) -> None:
    """A v3.0 dataset, written episode by episode; whole or not at all. Depth is an array of float32, never video."""
    with whole(path) as made:
        rows: list[dict[str, Any]] = []
        moments: dict[str, Moments] = {}
        writer: pq.ParquetWriter | None = None
        chunk_file, start = 0, 0
        for index, episode in enumerate(episodes):
            if not rows:
                told = features(about.spec, colour=episode.rgb is not None)
            columns = _columns(episode, index, start)
            for name, values in columns.items():
                moments.setdefault(name, Moments()).add(values)
            table = pa.table({name: list_of(columns[name], told[name]["dtype"]) for name in told})
            file = made / DATA_PATH.format(chunk_index=0, file_index=chunk_file)
            if writer is not None and file.stat().st_size > DATA_FILE_BYTES:
                writer.close()
                writer, chunk_file = None, chunk_file + 1
                file = made / DATA_PATH.format(chunk_index=0, file_index=chunk_file)
            if writer is None:
                file.parent.mkdir(parents=True, exist_ok=True)
                writer = pq.ParquetWriter(file, table.schema, compression="snappy")
            writer.write_table(table)
            rows.append(row_of(episode, index, start, chunk_file, about.task))
            start += len(episode)
        if writer is not None:
            writer.close()
            write_meta(made, rows, told, moments, about.task)
            ours = {"contract": about.spec.to_json(), "contract_digest": about.spec.digest}
            (made / "meta/equiserve.json").write_text(json.dumps(ours | {"about": about_to_json(about)}, indent=2))


def _columns(episode: Episode, index: int, start: int) -> dict[str, Array]:
    steps = len(episode)
    last = np.arange(steps) == steps - 1
    columns: dict[str, Array] = {
        NAMES["depth"]: episode.depth[:-1],
        NAMES["gripper"]: episode.gripper[:-1, 0],
        NAMES["action"]: episode.action,
        NAMES["reward"]: episode.reward,
        NAMES["done"]: last & episode.terminated,
        "timestamp": (np.arange(steps) / FPS).astype(np.float32),
        "frame_index": np.arange(steps),
        "episode_index": np.full(steps, index),
        "index": start + np.arange(steps),
        "task_index": np.zeros(steps, np.int64),
    }
    if episode.rgb is not None:
        columns[NAMES["rgb"]] = episode.rgb[:-1]
    return columns
