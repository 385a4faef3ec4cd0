"""What lies in a LeRobotDataset's `meta/`, field by field as lerobot's v3.0 writes it, and arrays in parquet."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protos.spaces import PolicySpec
from sim_client.episodes import Episode
from training.data.formats.raw import Array

NAMES = {
    "depth": "observation.depth",
    "gripper": "observation.gripper",
    "action": "action",
    "reward": "next.reward",
    "done": "next.done",
    "rgb": "observation.rgb",
}
"""Features, unless a geometry file says otherwise."""
OURS = "equiserve/"
"""Prefix of our own columns in meta/episodes."""
FPS = 10
"""Nominal: an episode of ours counts steps and has no clock, LeRobot wants whole frames per second."""
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"


def features(spec: PolicySpec, *, colour: bool) -> dict[str, Any]:
    """The features of a dataset under `spec`, in the order of its columns."""
    view = spec.observation
    scalars = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
    told: dict[str, Any] = {
        NAMES["depth"]: {"dtype": "float32", "shape": [*view.shape], "names": ["height", "width"]},
        NAMES["gripper"]: {"dtype": "float32", "shape": [1], "names": [view.gripper.value]},
        NAMES["action"]: {"dtype": "float32", "shape": [spec.action.size], "names": [*spec.action.components]},
        NAMES["reward"]: {"dtype": "float32", "shape": [1], "names": None},
        NAMES["done"]: {"dtype": "bool", "shape": [1], "names": None},
    }
    if colour:
        names = ["height", "width", "channels"]
        told[NAMES["rgb"]] = {"dtype": "uint8", "shape": [*view.shape, 3], "names": names}
    return told | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in scalars.items()}


def list_of(values: Array, dtype: str) -> pa.Array:
    """[T, ...] -> T nested lists, as Hugging Face's Value, Sequence, Array2D and Array3D are stored."""
    array = pa.array(np.ascontiguousarray(values).reshape(-1), type=pa.bool_() if dtype == "bool" else dtype)
    for axis in reversed(range(1, values.ndim)):
        count, size = int(np.prod(values.shape[:axis])), values.shape[axis]
        array = pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * size, pa.int32()), array)
    return array


def numpy_of(column: Any) -> Array:
    """T nested lists of equal lengths -> [T, ...]; the inverse of `list_of`. Raises ValueError on ragged ones."""
    array, shape = pa.concat_arrays(column.chunks), [len(column)]
    while pa.types.is_nested(array.type):
        lengths = pc.list_value_length(array).unique()
        if array.null_count or len(lengths) > 1:
            raise ValueError(f"lists of one length, got lengths {lengths.to_pylist()[:5]} and {array.null_count} nulls")
        inner = array.flatten()
        shape.append(len(inner) // max(len(array), 1))
        array = inner
    if array.null_count:
        raise ValueError(f"a value everywhere, got {array.null_count} nulls")
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def row_of(episode: Episode, index: int, start: int, file: int, task: str) -> dict[str, Any]:
    """The episode's row in meta/episodes."""
    row = {
        "episode_index": index,
        "tasks": [task],
        "length": len(episode),
        "data/chunk_index": 0,
        "data/file_index": file,
        "dataset_from_index": start,
        "dataset_to_index": start + len(episode),
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
        f"{OURS}terminated": episode.terminated,
        f"{OURS}truncated": episode.truncated,
        f"{OURS}seed": episode.seed,
        f"{OURS}behavior": episode.behavior,
        f"{OURS}depth": episode.depth[-1].copy(),  # a view would keep all frames until the last episode is written
        f"{OURS}gripper": episode.gripper[-1].copy(),
    }
    return row if episode.rgb is None else row | {f"{OURS}rgb": episode.rgb[-1].copy()}


@dataclass
class Moments:
    """Running statistics of a feature, per component."""

    count: int = 0
    total: Array = field(default_factory=lambda: np.zeros(1))
    squares: Array = field(default_factory=lambda: np.zeros(1))
    low: Array = field(default_factory=lambda: np.full(1, np.inf))
    high: Array = field(default_factory=lambda: np.full(1, -np.inf))

    def add(self, values: Array) -> None:
        wide = values.astype(np.float64).reshape(len(values), *(values.shape[1:] or (1,)))
        self.count += len(wide)
        self.total = self.total + wide.sum(axis=0)
        self.squares = self.squares + np.square(wide).sum(axis=0)
        self.low, self.high = np.minimum(self.low, wide.min(axis=0)), np.maximum(self.high, wide.max(axis=0))

    def to_json(self) -> dict[str, Any]:
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        told = {"min": self.low, "max": self.high, "mean": mean, "std": std}
        return {name: value.tolist() for name, value in told.items()} | {"count": [self.count]}


def write_meta(
    root: Path, rows: list[dict[str, Any]], told: dict[str, Any], moments: dict[str, Moments], task: str
) -> None:
    """info.json, stats.json, tasks.parquet and meta/episodes under `root`."""
    (root / EPISODES_PATH).parent.mkdir(parents=True)
    info = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": len(rows),
        "total_frames": rows[-1]["dataset_to_index"],
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": FPS,
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": told,
    }
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))
    (root / "meta/stats.json").write_text(json.dumps({name: m.to_json() for name, m in moments.items()}))
    pq.write_table(_tasks([task]), root / "meta/tasks.parquet")
    pq.write_table(pa.table({name: _column([row[name] for row in rows]) for name in rows[0]}), root / EPISODES_PATH)


def _column(values: list[Any]) -> pa.Array:
    if isinstance(values[0], np.ndarray):
        return list_of(np.stack(values), str(values[0].dtype))
    return pa.array(values, pa.int64()) if values[0] is None else pa.array(values)


def _tasks(tasks: list[str]) -> pa.Table:
    """lerobot reads it with pandas and looks tasks up in the index: the index is declared as pandas does."""
    table = pa.table({"task_index": list(range(len(tasks))), "task": tasks})
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
        for name, kind, numpy_type in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
