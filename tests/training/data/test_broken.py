"""Broken datasets: `validate` and training name the file and, where they exist, the episode, step and field."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protos.errors import Rejected
from protos.spaces import ACTION, ObservationSpec, PolicySpec
from sim_client import store
from tests.makers import tiny_policy_file
from tests.training.data.makers import ABOUT, REPOSITORY, SPEC, episode, minari, npz_arrays
from training.data.__main__ import BROKEN, REFUSED, main
from training.data.convert import write_dataset
from training.data.dataset import load

Breaker = Callable[[Path], None]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good dataset per format, to be copied and broken."""
    folder = tmp_path_factory.mktemp("good")
    made = {"minari": minari(folder / "set", 4)}
    for kind, name in (("robomimic", "set.hdf5"), ("lerobot", "lerobot")):
        made[kind] = folder / name
        write_dataset(made[kind], kind, (episode(i) for i in range(4)), ABOUT)
    return made


def refused_by_validate(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What `validate` says; it must be one line and exit with 1."""
    assert main(["validate", str(path), *options]) == BROKEN
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def hdf5(change: Callable[[Any], None]) -> Breaker:
    """An edit of main_data.hdf5."""

    def breaker(path: Path) -> None:
        with h5py.File(path / "data/main_data.hdf5", "a") as file:
            change(file)

    return breaker


def metadata(change: Callable[[dict[str, Any]], Any]) -> Breaker:
    def breaker(path: Path) -> None:
        file = path / "data/metadata.json"
        told = json.loads(file.read_text())
        change(told)
        file.write_text(json.dumps(told))

    return breaker


def put(name: str, where: tuple[int, ...], value: float) -> Breaker:
    """One number of episode 1 is another; its other episodes are good."""

    def change(file: Any) -> None:
        values = file[f"episode_1/{name}"][()]
        values[where] = value
        file[f"episode_1/{name}"][...] = values

    return hdf5(change)


def become(name: str, change: Callable[[np.ndarray], np.ndarray], index: int = 1) -> Breaker:
    """An array of another shape or type takes the place of one."""

    def replaced(file: Any) -> None:
        values = file[f"episode_{index}/{name}"][()]
        del file[f"episode_{index}/{name}"]
        file[f"episode_{index}/{name}"] = change(values)

    return hdf5(replaced)


def swap(name: str, value: Any) -> Breaker:
    """Something else takes the place of an array of episode 1."""

    def change(file: Any) -> None:
        del file[f"episode_1/{name}"]
        file[f"episode_1/{name}"] = value

    return hdf5(change)


def gone(name: str) -> Breaker:
    return hdf5(lambda file: file.__delitem__(name))


def content(change: Callable[[bytes], bytes]) -> Breaker:
    def breaker(path: Path) -> None:
        file = path / "data/main_data.hdf5"
        file.write_bytes(change(file.read_bytes()))

    return breaker


def emptied(file: Any) -> None:
    for name in ("actions", "rewards", "terminations", "truncations"):
        file[f"episode_1/{name}"].resize(0, axis=0)


DEPTH, GRIPPER = "observations/depth", "observations/gripper"
MINARI: dict[str, tuple[Breaker, str]] = {
    "a file cut short": (content(lambda data: data[:4000]), "episode 0: expected an undamaged main_data.hdf5"),
    "a file of no bytes": (content(lambda data: b""), "episode 0: expected an undamaged main_data.hdf5"),
    "a file that is not HDF5": (content(lambda data: b"hello" * 999), "expected an undamaged main_data.hdf5"),
    "no file": (lambda path: (path / "data/main_data.hdf5").unlink(), "expected a Minari dataset"),
    "no metadata file": (lambda path: (path / "data/metadata.json").unlink(), "expected a Minari dataset"),
    "metadata that are no JSON": (lambda path: (path / "data/metadata.json").write_text("{"), "a Minari dataset"),
    "no observation space": (metadata(lambda told: told.pop("observation_space")), "expected a Minari dataset"),
    "no contract": (metadata(lambda told: told.pop("contract")), "metadata.contract: expected the JSON"),
    "half a contract": (metadata(lambda told: told.update(contract='{"observation": {}}')), "metadata.contract"),
    "another digest": (metadata(lambda told: told.update(contract_digest="0" * 64)), "metadata.contract_digest"),
    "notes that are no JSON": (metadata(lambda told: told.update(notes="{")), "metadata.notes: expected JSON"),
    "notes that are no text": (metadata(lambda told: told.update(notes={})), "metadata.notes: expected JSON"),
    "notes that are a list": (metadata(lambda told: told.update(notes="[1]")), "metadata.notes: expected JSON"),
    "a task without a name": (metadata(lambda told: told.update(task="")), "metadata.task: expected printable text"),
    "metadata of fewer episodes": (metadata(lambda told: told.update(total_episodes=2)), "total_episodes: expected 4"),
    "metadata of more episodes": (metadata(lambda told: told.update(total_episodes=9)), "total_episodes: expected 4"),
    "no episodes": (hdf5(lambda file: file.clear()), "expected at least one episode"),
    "an episode missing": (gone("episode_2"), "total_episodes"),
    "an empty episode": (hdf5(emptied), "episode 1: expected at least one step"),
    "no actions": (gone("episode_1/actions"), "episode 1: expected an undamaged"),
    "no rewards": (gone("episode_1/rewards"), "episode 1: expected an undamaged"),
    "no observations": (gone("episode_1/observations"), "episode 1: expected an undamaged"),
    "no depth": (gone(f"episode_1/{DEPTH}"), "episode 1, observations: expected depth and gripper"),
    "no gripper": (gone(f"episode_1/{GRIPPER}"), "episode 1, observations: expected depth and gripper"),
    "no end": (gone("episode_1/terminations"), "episode 1: expected an undamaged"),
    "NaN depth": (put(DEPTH, (2, 3, 4), np.nan), "episode 1, step 2, depth: expected finite"),
    "infinite depth": (put(DEPTH, (3, 0, 0), -np.inf), "episode 1, step 3, depth: expected finite"),
    "negative depth": (put(DEPTH, (1, 0, 0), -0.001), "episode 1, step 1, depth: expected 0 to 0.6 m"),
    "depth in millimetres": (put(DEPTH, (0,), 250), "episode 1, step 0, depth: expected 0 to 0.6 m"),
    "depth of another size": (become(DEPTH, lambda d: d[:, :8, :8]), "episode 1, depth: expected shape (4, 16, 16)"),
    "depth without its last frame": (become(DEPTH, lambda d: d[:-1]), "episode 1, depth: expected shape (4, 16, 16)"),
    "depth of integers": (become(DEPTH, lambda d: (d * 1000).astype("uint16")), "episode 1, depth: expected float32"),
    "depth of text": (become(DEPTH, lambda d: np.full(d.shape, b"x")), "episode 1, depth: expected float32"),
    "NaN gripper": (put(GRIPPER, (2, 0), np.nan), "episode 1, step 2, gripper: expected finite"),
    "gripper in millimetres": (put(GRIPPER, (1, 0), 80), "episode 1, step 1, gripper: expected 0 to 1"),
    "two grippers": (become(GRIPPER, lambda g: np.hstack([g, g])), "episode 1, gripper: expected shape (4, 1)"),
    "NaN action": (put("actions", (2, 3), np.nan), "episode 1, step 2, action: expected finite"),
    "a gripper command of -1": (put("actions", (0, 0), -1), "episode 1, step 0, action.gripper: expected 0 to 1"),
    "planar beyond its radius": (put("actions", (1, slice(1, 3)), 0.04), "episode 1, step 1, action.planar"),
    "lift beyond its limit": (put("actions", (2, 3), 0.051), "episode 1, step 2, action.lift"),
    "yaw in degrees": (put("actions", (0, 4), 45), "episode 1, step 0, action.yaw"),
    "actions of four": (become("actions", lambda a: a[:, :4]), "episode 1, action: expected shape (3, 5)"),
    "actions of integers": (become("actions", lambda a: a.astype(int)), "episode 1, action: expected float32"),
    "an action too many": (
        become("actions", lambda a: np.vstack([a, a])),
        "episode 1, termination: expected shape (6,)",
    ),
    "a reward too few": (become("rewards", lambda r: r[:-1]), "episode 1, reward: expected shape (3,)"),
    "NaN reward": (put("rewards", (1,), np.nan), "episode 1, step 1, reward: expected finite"),
    "a reward that is no row": (swap("rewards", np.float64(0)), "episode 1: expected an undamaged"),
    "an end that is no row": (swap("terminations", np.bool_(False)), "episode 1: expected an undamaged"),
    "a seed of text": (hdf5(lambda file: file["episode_1"].attrs.update({"seed": "abc"})), "expected an undamaged"),
    "a reward beyond float32": (
        become("rewards", lambda r: r.astype(np.float64) + 1e39),
        "episode 1, step 0, reward: expected finite",
    ),
    "an end too many": (become("truncations", lambda t: np.append(t, t)), "episode 1, truncation: expected shape (3,)"),
    "a termination before the end": (put("terminations", (1,), 1), "episode 1, step 1, termination"),
    "a truncation before the end": (put("truncations", (0,), 1), "episode 1, step 0, truncation"),
}


@pytest.mark.parametrize("name", MINARI)
def test_a_broken_dataset_is_named_by_validate_and_never_trains(
    name: str, good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaker, expected = MINARI[name]
    path = Path(shutil.copytree(good["minari"], tmp_path / "set"))
    breaker(path)
    said = refused_by_validate(path, capsys)
    assert str(path) in said
    assert expected in said
    with pytest.raises(Rejected) as refusal:
        load(path, successful_only=False)
    assert str(path) in str(refusal.value)
    assert expected in str(refusal.value)


def arrays(**changes: Any) -> Callable[[Path], None]:
    """An npz with some arrays replaced; None leaves one out."""

    def breaker(path: Path) -> None:
        made = {name: changes.get(name, values) for name, values in npz_arrays().items()} | changes
        np.savez(path, **{name: values for name, values in made.items() if values is not None})

    return breaker


def poked(name: str, where: Any, value: float) -> Callable[[Path], None]:
    values = npz_arrays()[name]
    values[where] = value
    return arrays(**{name: values})


NPZ: dict[str, tuple[Breaker, str]] = {
    "text": (lambda path: path.write_text("hello"), "expected an undamaged .npz"),
    "no bytes": (lambda path: path.write_bytes(b""), "expected an undamaged .npz"),
    "cut short": (lambda path: (arrays()(path), path.write_bytes(path.read_bytes()[:2000]))[0], "undamaged .npz"),
    "pickled": (arrays(behavior=np.array([{}, {}, {}], object)), "save arrays of numbers and text, never objects"),
    "half a contract": (arrays(contract=np.array("{}")), "contract"),
    "another digest": (arrays(contract_digest=np.array("0" * 64)), "contract_digest"),
    "no lengths": (arrays(episode_lengths=None), "episode_lengths: expected the number of actions"),
    "no episodes": (arrays(episode_lengths=np.zeros(0, int)), "episode_lengths: expected at least one episode"),
    "an empty episode": (arrays(episode_lengths=np.array([2, 0, 7])), "episode 1, episode_lengths"),
    "lengths of floats": (arrays(episode_lengths=np.array([2.0, 3, 4])), "episode_lengths: expected integers"),
    "lengths that disagree": (arrays(episode_lengths=np.array([2, 3, 5])), "depth: expected length 13"),
    "no frame after the last": (arrays(depth=npz_arrays()["depth"][:-1]), "depth: expected length 12"),
    "no gripper": (arrays(gripper=None), "gripper: expected an array of length 12"),
    "a seed too few": (arrays(seed=np.array([1, 2])), "seed: expected length 3, one per episode"),
    "a seed that is no number": (arrays(seed=np.array([np.nan] * 3)), "seed: expected integers, -1 for none"),
    "ends of another shape": (arrays(terminated=np.zeros((3, 2), bool)), "terminated: expected shape [3]"),
    "ends in words": (
        arrays(terminated=np.array(["False"] * 3)),
        "terminated: expected bool, of each episode, got <U5",
    ),
    "ends that are no numbers": (arrays(truncated=np.full(3, np.nan)), "truncated: expected bool"),
    "a behaviour of two lines": (arrays(behavior=np.array(["a\nb"] * 3)), "behavior: expected a text without control"),
    "no end": (arrays(terminated=None), "episode 0, terminated: expected one per episode"),
    "no reward": (arrays(reward=None), "episode 0, reward: expected one per step"),
    "NaN depth": (poked("depth", (5, 1, 1), np.nan), "episode 1, step 2, depth: expected finite"),
    "yaw in degrees": (poked("action", (4, 4), 30), "episode 1, step 2, action.yaw"),
}


@pytest.mark.parametrize("name", NPZ)
def test_a_broken_npz_is_named_and_not_imported(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    breaker, expected = NPZ[name]
    path = tmp_path / "set.npz"
    breaker(path)
    said = refused_by_validate(path, capsys)
    assert str(path) in said
    assert expected in said
    assert main(["import", str(path), "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(Rejected, match=r"training\.data import"):
        load(path, successful_only=False)


def robomimic(change: Callable[[Any], Any]) -> Breaker:
    def breaker(path: Path) -> None:
        with h5py.File(path, "a") as file:
            change(file)

    return breaker


def without(name: str) -> Breaker:
    return robomimic(lambda file: file.__delitem__(name))


def nan_depth(file: Any) -> None:
    file["data/demo_1/obs/depth"][2, 0, 0, 0] = np.nan


def shortened(name: str) -> Breaker:
    """Demonstration 1 lacks the last of what `name` holds."""

    def change(file: Any) -> None:
        values = file[f"data/demo_1/{name}"][:-1]
        del file[f"data/demo_1/{name}"]
        file[f"data/demo_1/{name}"] = values

    return robomimic(change)


def nameless(file: Any) -> None:
    told = json.loads(file["data"].attrs["about"])
    file["data"].attrs["about"] = json.dumps(told | {"task": ""})


ROBOMIMIC: dict[str, tuple[Breaker, str]] = {
    "no bytes": (lambda path: path.write_bytes(b""), "expected an undamaged HDF5 file"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "expected an undamaged HDF5 file"),
    "no data": (without("data"), "data: expected the group"),
    "data that are no group": (
        robomimic(lambda file: (file.__delitem__("data"), file.create_dataset("data", data=[1.0]))),
        "data: expected the group",
    ),
    "no demonstrations": (robomimic(lambda file: file["data"].clear()), "data: expected at least one demonstration"),
    "a task without a name": (robomimic(nameless), "task: expected printable text"),
    "no observations": (without("data/demo_1/obs"), "episode 1, obs: expected in /data/demo_1"),
    "no depth": (without("data/demo_1/obs/depth"), "episode 1, obs/depth: expected in /data/demo_1"),
    "no actions": (without("data/demo_1/actions_physical"), "episode 1, actions_physical"),
    "no rewards": (without("data/demo_1/rewards"), "episode 1, reward: expected one per step"),
    "a count that disagrees": (
        robomimic(lambda file: file["data/demo_1"].attrs.update(num_samples=9)),
        "episode 1, num_samples: expected 3",
    ),
    "a done too few": (shortened("dones"), "episode 1, dones: expected length 3, one per action"),
    "a next frame too few": (shortened("next_obs/depth"), "episode 1, next_obs/depth: expected length 3"),
    "a next gripper too few": (shortened("next_obs/gripper"), "episode 1, next_obs/gripper: expected length 3"),
    "NaN depth": (robomimic(nan_depth), "episode 1, step 2, depth: expected finite"),
}


@pytest.mark.parametrize("name", ROBOMIMIC)
def test_a_broken_robomimic_file_is_named(
    name: str, good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaker, expected = ROBOMIMIC[name]
    path = Path(shutil.copy(good["robomimic"], tmp_path / "set.hdf5"))
    breaker(path)
    said = refused_by_validate(path, capsys)
    assert str(path) in said
    assert expected in said


def info(**changes: Any) -> Breaker:
    def breaker(path: Path) -> None:
        file = path / "meta/info.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return breaker


def rows(change: Callable[[pa.Table], pa.Table]) -> Breaker:
    def breaker(path: Path) -> None:
        file = path / "data/chunk-000/file-000.parquet"
        pq.write_table(change(pq.read_table(file)), file)

    return breaker


def as_video(path: Path) -> None:
    features = json.loads((path / "meta/info.json").read_text())["features"]
    features["observation.depth"]["dtype"] = "video"
    info(features=features)(path)


def without_dtype(path: Path) -> None:
    features = json.loads((path / "meta/info.json").read_text())["features"]
    del features["observation.gripper"]["dtype"]
    info(features=features)(path)


def of_two_tasks(table: pa.Table) -> pa.Table:
    second = pa.array([min(index, 1) for index in table.column("episode_index").to_pylist()])
    return table.set_column(table.column_names.index("task_index"), "task_index", second)


LEROBOT: dict[str, tuple[Breaker, str]] = {
    "info that is no JSON": (lambda path: (path / "meta/info.json").write_text("{"), "a LeRobotDataset's metadata"),
    "another version": (info(codebase_version="v1.6"), "codebase_version: expected v3.0 or v2.1"),
    "no depth feature": (info(features={}), "observation.depth: expected a feature"),
    "no features": (info(features=None), "a LeRobotDataset's metadata"),
    "a feature of no type": (without_dtype, "meta/info.json, observation.gripper: expected a feature with its dtype"),
    "two tasks": (rows(of_two_tasks), "episode 1, task_index: expected one task in all episodes, got [0, 1]"),
    "lossy video": (as_video, "lossy video is no depth in metres"),
    "no rows": (lambda path: shutil.rmtree(path / "data"), "episode 0, data: expected parquet files"),
    "an episode missing": (rows(lambda table: table.slice(0, 5)), "total_episodes: expected 4"),
    "a row missing": (rows(lambda table: table.slice(1)), "episode 0, frame_index: expected 0, 1, 2"),
    "no actions": (rows(lambda table: table.drop_columns(["action"])), "episode 0"),
    "parquet cut short": (
        lambda path: (path / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1"),
        "episode 0: expected undamaged parquet",
    ),
}


@pytest.mark.parametrize("name", LEROBOT)
def test_a_broken_lerobot_dataset_is_named(
    name: str, good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaker, expected = LEROBOT[name]
    path = Path(shutil.copytree(good["lerobot"], tmp_path / "set"))
    breaker(path)
    said = refused_by_validate(path, capsys)
    assert str(path) in said
    assert expected in said


def test_another_contract_than_asked_for_is_named_field_by_field(
    good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = PolicySpec(ObservationSpec(height=16, width=16, extent_m=0.3, row_axis=(1, 0)), ACTION)
    (tmp_path / "other.json").write_text(other.to_json())
    said = refused_by_validate(good["minari"], capsys, "--contract", str(tmp_path / "other.json"))
    assert "contract.observation.extent_m" in said
    assert "observation.row_axis.0=1" in said
    (tmp_path / "same.json").write_text(SPEC.to_json())
    assert main(["validate", str(good["minari"]), "--contract", str(tmp_path / "same.json")]) == 0


@pytest.mark.parametrize("of", ["policy.onnx", "a dataset"])
def test_a_contract_is_asked_for_by_what_carries_it(
    of: str, good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tiny_policy_file(tmp_path / "same.onnx", SPEC) if of == "policy.onnx" else good["lerobot"]
    assert main(["validate", str(good["minari"]), "--contract", str(same)]) == 0
    other = PolicySpec(ObservationSpec(height=16, width=16, extent_m=0.3), ACTION)
    if of == "policy.onnx":
        carrier = tiny_policy_file(tmp_path / "other.onnx", other)
    else:
        carrier = tmp_path / "other"
        store.write(carrier, iter([episode(0)]), replace(ABOUT, spec=other))
    said = refused_by_validate(good["minari"], capsys, "--contract", str(carrier))
    assert "contract.observation.extent_m" in said


@pytest.mark.parametrize("name", ["binary", "half.onnx", "folder", "text", "nowhere"])
def test_what_carries_no_contract_is_told_in_a_line(
    name: str, good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, held in {"binary": b"\x08\x0a\xff", "half.onnx": b"\x08\x0a\xff", "text": b"{"}.items():
        (tmp_path / file).write_bytes(held)
    (tmp_path / "folder").mkdir()
    assert main(["validate", str(good["minari"]), "--contract", str(tmp_path / name)]) == REFUSED
    said = capsys.readouterr().err
    assert said.startswith(f"refused: --contract {tmp_path / name}")
    assert said.count("\n") == 1


def unsaid(kind: str, path: Path) -> None:
    """What the numbers at `path` mean is told no more."""
    if kind == "npz":
        arrays(contract=None)(path)
    elif kind == "robomimic":
        robomimic(lambda file: file["data"].attrs.__delitem__("contract"))(path)
    else:
        (path / "meta/equiserve.json").unlink()


def copied(kind: str, good: dict[str, Path], folder: Path) -> Path:
    if kind == "npz":
        arrays()(folder / "set.npz")
        return folder / "set.npz"
    copy = shutil.copy if good[kind].is_file() else shutil.copytree
    return Path(copy(good[kind], folder / good[kind].name))


@pytest.mark.parametrize("kind", ["npz", "robomimic", "lerobot"])
def test_data_that_want_a_geometry_are_not_broken(
    kind: str, good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(kind, good, tmp_path)
    unsaid(kind, path)
    assert main(["validate", str(path)]) == REFUSED
    assert f"refused: {path}, contract: expected a contract in the file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["minari", "npz", "robomimic", "lerobot"])
def test_data_that_want_no_geometry_are_not_broken_by_one(
    kind: str, good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, geometry = copied(kind, good, tmp_path), tmp_path / "camera.toml"
    geometry.write_text((REPOSITORY / "docs/camera.toml").read_text().replace("# depth =", "depth ="))  # "birdview_..."
    assert main(["validate", str(path), "--geometry", str(geometry)]) == REFUSED
    assert f"refused: --geometry: expected nothing: {path} carries its contract" in capsys.readouterr().err
