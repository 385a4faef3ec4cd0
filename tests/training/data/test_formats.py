"""Formats: what goes out comes back, bit for bit, in the layouts that other people's tools expect."""

import dataclasses
import gc
import io
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protos.errors import Rejected
from protos.files import SPARE_BYTES
from sim_client import store
from sim_client.episodes import Episode
from tests.sim_client.test_store import small_disk
from tests.training.data.makers import ABOUT, REPOSITORY, SPEC, assert_same, episode, minari, npz_arrays
from training.data.convert import detect, open_dataset, write_dataset
from training.data.formats import lerobot, lerobot_meta
from training.data.geometry_file import read_geometry

SUFFIX = {"npz": ".npz", "robomimic": ".hdf5", "lerobot": ""}
CAMERA = REPOSITORY / "docs/camera.toml"


@pytest.mark.parametrize("colour", [False, True], ids=["depth", "colour"])
@pytest.mark.parametrize("kind", SUFFIX)
def test_a_round_trip_keeps_every_value(kind: str, colour: bool, tmp_path: Path) -> None:
    original = minari(tmp_path / "minari", colour=colour)
    between = tmp_path / f"between{SUFFIX[kind]}"
    write_dataset(between, kind, store.read(original), store.read_about(original))
    assert detect(between) == kind
    about, episodes = open_dataset(between)
    write_dataset(tmp_path / "again", "minari", episodes, about)
    assert_same(list(store.read(tmp_path / "again")), [episode(i, colour=colour) for i in range(5)])
    assert store.read_about(tmp_path / "again") == ABOUT


@pytest.mark.parametrize("kind", SUFFIX)
def test_a_failed_export_leaves_nothing_behind(kind: str, tmp_path: Path) -> None:
    def failing():  # type: ignore[no-untyped-def]
        yield episode(0)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        write_dataset(tmp_path / f"out{SUFFIX[kind]}", kind, failing(), ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_a_robomimic_file_that_would_fill_the_disk_is_not_begun_or_gone_on_with(tmp_path: Path, monkeypatch) -> None:
    """HDF5 ends the process where a disk fills up while it writes."""
    for episodes, purpose in ((-0.5, "begin"), (1.5, "write demo_0"), (3.5, r"write demo_\d")):
        small_disk(tmp_path, SPARE_BYTES + int(episodes * episode(0).nbytes), monkeypatch)
        with pytest.raises(OSError, match=f"No space left on device: .* needed to {purpose}"):
            write_dataset(tmp_path / "out.hdf5", "robomimic", map(episode, range(30)), ABOUT)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", SUFFIX)
def test_nothing_is_overwritten(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{SUFFIX[kind]}"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        write_dataset(path, kind, iter([episode(0)]), ABOUT)
    assert path.read_text() == "precious"


def test_npz_arrays_of_another_precision_and_the_bare_minimum_are_read(tmp_path: Path) -> None:
    arrays = npz_arrays()
    arrays["reward"] = arrays["reward"].astype(np.float64)
    np.savez(tmp_path / "bare.npz", **arrays)
    about, episodes = open_dataset(tmp_path / "bare.npz")
    read = list(episodes)
    assert about.spec == SPEC
    assert [len(e) for e in read] == [2, 3, 4]
    assert read[0].reward.dtype == np.float32
    assert read[0].seed is None


def test_robomimic_finds_the_layout_it_expects(tmp_path: Path) -> None:
    path = tmp_path / "out.hdf5"
    write_dataset(path, "robomimic", (episode(i) for i in range(3)), ABOUT)
    with h5py.File(path) as file:
        data = file["data"]
        assert data.attrs["total"] == 9
        assert json.loads(data.attrs["env_args"])["env_name"] == "equiserve/Reach-v0"
        assert sorted(data) == ["demo_0", "demo_1", "demo_2"]
        for demo in data.values():
            steps = demo.attrs["num_samples"]
            assert demo["actions"].shape == (steps, 5)
            assert np.abs(demo["actions"][()]).max() <= 1 + 1e-5  # robomimic refuses others
            assert demo["obs/depth"].shape == (steps, 16, 16, 1)
            np.testing.assert_array_equal(demo["obs/depth"][1:], demo["next_obs/depth"][:-1])
            assert demo["rewards"].shape == demo["dones"].shape == (steps,)
        assert data["demo_0/dones"][()].tolist() == [0, 1]
        assert data["demo_1/dones"][()].tolist() == [0, 0, 0]


def test_robomimic_filter_keys_are_tolerated_and_demonstrations_come_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "out.hdf5"
    write_dataset(path, "robomimic", (episode(i) for i in range(12)), ABOUT)
    with h5py.File(path, "a") as file:
        file["mask/valid"] = np.array(["demo_1", "demo_10"], dtype="S")
    assert_same(list(open_dataset(path)[1]), [episode(i) for i in range(12)])  # demo_10 does not follow demo_1


def foreign_robomimic(path: Path, *, next_obs: bool) -> Path:
    """As a lab might have it: millimetres in uint16, seven columns normalised, success held for three steps."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = "{}"
        for index in range(2):
            rng, demo = np.random.default_rng(index), data.create_group(f"demo_{index}")
            demo["actions"] = rng.uniform(-1, 1, (6, 7))
            demo["rewards"] = np.array([0, 0, 0, 0, 0, 1.0])
            demo["dones"] = np.array([0, 0, 0, 1, 1, 1])
            frames = rng.integers(0, 600, (7, 64, 64, 1)).astype(np.uint16)
            holds = np.array([0, 0, 0, 1, 1, 1, 1])
            for folder, part in (("obs", slice(0, 6)), ("next_obs", slice(1, 7))):
                if folder == "obs" or next_obs:
                    demo[f"{folder}/depth"], demo[f"{folder}/gripper"] = frames[part], holds[part]
    return path


def test_foreign_robomimic_is_read_through_a_geometry(tmp_path: Path) -> None:
    path = foreign_robomimic(tmp_path / "lab.hdf5", next_obs=True)
    about, episodes = open_dataset(path, geometry=read_geometry(CAMERA))
    first = next(episodes)
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        np.testing.assert_allclose(first.depth[:-1], demo["obs/depth"][..., 0] / 1000, rtol=1e-6)
        np.testing.assert_allclose(first.depth[-1], demo["next_obs/depth"][-1, ..., 0] / 1000, rtol=1e-6)
        np.testing.assert_allclose(first.action[:, 1], demo["actions"][:, 0] * 0.05, rtol=1e-6)
    assert first.terminated
    assert about.spec.observation.height == 64


def test_without_a_last_frame_a_termination_repeats_one_and_a_truncation_drops_an_action(tmp_path: Path) -> None:
    path = foreign_robomimic(tmp_path / "lab.hdf5", next_obs=False)
    with h5py.File(path, "a") as file:
        file["data/demo_1/rewards"][-1] = 0  # this one fails: it was cut off, not ended
    succeeded, failed = open_dataset(path, geometry=read_geometry(CAMERA))[1]
    assert len(succeeded) == 6
    np.testing.assert_array_equal(succeeded.depth[-1], succeeded.depth[-2])
    assert len(failed) == 5
    assert failed.truncated
    assert not (failed.depth[-1] == failed.depth[-2]).all()


def fail_at_once(path: Path, demonstration: str) -> None:
    """Only its first action is left, and it fails."""
    with h5py.File(path, "a") as file:
        demo = file["data"][demonstration]
        for name, values in (("actions", np.zeros((1, 7))), ("rewards", [0.0]), ("dones", [0])):
            del demo[name]
            demo[name] = values
        for name in ("depth", "gripper"):
            first = demo[f"obs/{name}"][:1]
            del demo[f"obs/{name}"]
            demo[f"obs/{name}"] = first


def test_a_failure_of_one_action_is_left_out_where_no_frame_shows_what_came_of_it(tmp_path: Path, caplog) -> None:
    path = foreign_robomimic(tmp_path / "lab.hdf5", next_obs=False)
    fail_at_once(path, "demo_0")
    assert [len(read) for read in open_dataset(path, geometry=read_geometry(CAMERA))[1]] == [6]
    assert "episode 0: left out: its only action failed" in caplog.text
    fail_at_once(path, "demo_1")
    with pytest.raises(Rejected, match=r"lab\.hdf5: expected at least one episode"):
        list(open_dataset(path, geometry=read_geometry(CAMERA))[1])


def test_lists_of_several_lengths_are_not_shuffled_into_one_shape() -> None:
    for lists in ([[1, 2], [3, 4, 5, 6]], [None, [3, 4, 5, 6]], [[1, None], [3, 4]]):
        with pytest.raises(ValueError, match="got"):
            lerobot_meta.numpy_of(pa.chunked_array([pa.array(lists)]))


def test_the_first_done_ends_an_episode_when_done_tells_success(tmp_path: Path) -> None:
    path = foreign_robomimic(tmp_path / "lab.hdf5", next_obs=True)
    geometry_file = tmp_path / "camera.toml"
    geometry_file.write_text(CAMERA.read_text().replace('from = "reward"', 'from = "done"'))
    for read in open_dataset(path, geometry=read_geometry(geometry_file))[1]:
        assert read.reward.tolist() == [0, 0, 0, 1]
        assert read.terminated
        assert len(read.depth) == 5


@pytest.mark.parametrize(("source", "warned"), [("done", True), ("reward", False)])
def test_success_of_all_by_their_done_flags_is_suspicious(source: str, warned: bool, tmp_path: Path, caplog) -> None:
    """LeRobot's `next.done` marks an episode's last frame, whatever came of it."""
    path, geometry_file = lerobot_v21(tmp_path / "lab"), tmp_path / "camera.toml"
    for file in (path / "data/chunk-000").iterdir():
        table = pq.read_table(file)
        pq.write_table(table.append_column("next.done", pa.array([False, False, False, True])), file)
    geometry_file.write_text(CAMERA.read_text().replace('from = "reward"', f'from = "{source}"'))
    assert len(list(open_dataset(path, geometry=read_geometry(geometry_file))[1])) == 2
    assert ("all 2 episodes succeed, by their done flags" in caplog.text) is warned


def test_lerobot_finds_the_layout_it_expects(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_dataset(path, "lerobot", (episode(i) for i in range(3)), ABOUT)
    info = json.loads((path / "meta/info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"]) == ("v3.0", 3, 9)
    rows = pq.read_table(path / info["data_path"].format(chunk_index=0, file_index=0))
    assert set(rows.column_names) == set(info["features"])
    assert rows.schema.field("observation.depth").type == pa.list_(pa.list_(pa.float32()))
    assert rows.schema.field("next.reward").type == pa.float32()
    assert rows.column("index").to_pylist() == list(range(9))
    assert rows.column("frame_index").to_pylist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    told = pq.read_table(path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in told] == [(0, 2), (2, 5), (5, 9)]
    stats = json.loads((path / "meta/stats.json").read_text())["action"]
    together = np.concatenate([episode(i).action for i in range(3)]).astype(float)
    np.testing.assert_allclose(stats["mean"], together.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(stats["std"], together.std(axis=0), rtol=1e-6)
    index = json.loads(pq.read_schema(path / "meta/tasks.parquet").metadata[b"pandas"])["index_columns"]
    assert index == ["task"]  # lerobot looks a task up in pandas' index


def test_a_lerobot_dataset_whose_last_frames_another_tool_dropped_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_dataset(path, "lerobot", (episode(i) for i in range(2)), ABOUT)
    file = path / lerobot_meta.EPISODES_PATH
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["equiserve/depth", "equiserve/gripper"]), file)
    ended, cut = open_dataset(path)[1]
    assert len(ended) == len(episode(0))
    assert len(cut) == len(episode(1)) - 1


def test_a_lerobot_dataset_is_written_with_one_episode_in_memory(tmp_path: Path) -> None:
    frames = []

    def watched() -> Iterator[Episode]:
        for index in range(6):
            made = episode(index, colour=True)
            frames.extend((weakref.ref(made.depth), weakref.ref(made.gripper), weakref.ref(made.rgb)))
            yield made
            del made
            gc.collect()
            assert sum(frame() is not None for frame in frames) <= 3

    write_dataset(tmp_path / "out", "lerobot", watched(), ABOUT)
    assert_same(list(open_dataset(tmp_path / "out")[1]), [episode(index, colour=True) for index in range(6)])


def test_colour_of_foreign_data_is_not_looked_at(tmp_path: Path) -> None:
    """Nobody reads it where a geometry file says what a view is: one frame less than of depth is no mistake."""
    arrays = {"depth": np.full((5, 64, 64), 250), "gripper": np.zeros(5), "action": np.zeros((4, 5))}
    arrays |= {"episode_lengths": np.array([4]), "reward": np.eye(4)[3], "rgb": np.zeros((4, 64, 64, 3), np.uint8)}
    geometry = dataclasses.replace(read_geometry(CAMERA), width=5, columns=tuple((i, 1.0, 0.0) for i in range(5)))
    np.savez(tmp_path / "lab.npz", **arrays)
    (read,) = open_dataset(tmp_path / "lab.npz", geometry=geometry)[1]
    assert len(read) == 4
    assert read.rgb is None


def test_large_lerobot_datasets_are_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot, "DATA_FILE_BYTES", 1)
    write_dataset(tmp_path / "out", "lerobot", (episode(i) for i in range(3)), ABOUT)
    assert len(list((tmp_path / "out/data/chunk-000").iterdir())) == 3
    assert_same(list(open_dataset(tmp_path / "out")[1]), [episode(i) for i in range(3)])


def lerobot_v21(path: Path) -> Path:
    """The layout of v2.1: one parquet file per episode, JSON lines for metadata; depth as 16-bit PNG."""
    features = {name: {"dtype": "float32", "shape": [1]} for name in ("observation.gripper", "action", "next.reward")}
    features["observation.depth"] = {"dtype": "image", "shape": [64, 64, 1]}
    (path / "meta").mkdir(parents=True)
    (path / "data/chunk-000").mkdir(parents=True)
    info = {"codebase_version": "v2.1", "total_episodes": 2, "features": features}
    (path / "meta/info.json").write_text(json.dumps(info))
    for index in range(2):
        images = []
        for step in range(4):
            buffer = io.BytesIO()
            Image.fromarray(np.full((64, 64), 100 * step, np.uint16)).save(buffer, format="PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        columns = {
            "observation.depth": images,
            "observation.gripper": [0.0, 0.0, 1.0, 1.0],
            "action": [[0.5, -0.5, 0.0, 0.0, 0.0, 10.0, 1.0]] * 4,
            "next.reward": [0.0, 0.0, 0.0, 1.0],
            "frame_index": [0, 1, 2, 3],
            "episode_index": [index] * 4,
        }
        pq.write_table(pa.table(columns), path / f"data/chunk-000/episode_{index:06d}.parquet")
    return path


def test_lerobot_v21_with_png_depth_is_read_through_a_geometry(tmp_path: Path) -> None:
    episodes = list(open_dataset(lerobot_v21(tmp_path / "lab"), geometry=read_geometry(CAMERA))[1])
    assert len(episodes) == 2
    np.testing.assert_allclose(episodes[0].depth[:, 5, 5], [0, 0.1, 0.2, 0.3, 0.3], atol=1e-7)
    np.testing.assert_allclose(episodes[0].action[0], [1, 0.025, -0.025, 0, np.radians(10)], atol=1e-7)


def test_a_geometry_is_refused_where_a_minari_dataset_carries_its_contract(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="--geometry"):
        open_dataset(minari(tmp_path / "set"), geometry=read_geometry(CAMERA))


def test_a_geometry_is_refused_where_the_file_carries_its_contract(tmp_path: Path) -> None:
    write_dataset(tmp_path / "out.npz", "npz", iter([episode(0)]), ABOUT)
    with pytest.raises(Rejected, match="carries its contract"):
        open_dataset(tmp_path / "out.npz", geometry=read_geometry(CAMERA))
