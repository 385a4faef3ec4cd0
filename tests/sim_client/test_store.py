"""Datasets on disk: every value survives, whole or not at all, smaller than raw; Minari opens and extends them."""

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
from minari.data_collector.episode_buffer import EpisodeBuffer

from protos.errors import Rejected
from protos.files import SPARE_BYTES
from protos.spaces import SPEC
from sim_client.episodes import Episode
from sim_client.store import About, read, read_about, write

ABOUT = About(SPEC, task="block_picking", behavior="expert", notes={"seed": 3})


def made(index: int, steps: int = 4, rgb: bool = False) -> Episode:
    rng = np.random.default_rng(index)
    frames = np.full((steps + 1, *SPEC.observation.shape), 0.3, np.float32)
    frames[:, 40:60, 50:80] = rng.uniform(0.1, 0.3, (steps + 1, 20, 30))
    return Episode(
        depth=frames,
        gripper=rng.integers(0, 2, (steps + 1, 1)).astype(np.float32),
        action=SPEC.action.project(rng.uniform(-0.1, 0.1, (steps, SPEC.action.size)).astype(np.float32)),
        reward=np.array([0.0] * (steps - 1) + [index % 2], np.float32),
        terminated=bool(index % 2),
        truncated=not index % 2,
        seed=index if index else None,
        behavior=f"behavior{index}",
        rgb=rng.integers(0, 255, (steps + 1, *SPEC.observation.shape, 3)).astype(np.uint8) if rgb else None,
    )


def same(one: Episode, other: Episode) -> bool:
    a, b = vars(one), vars(other)
    return all(np.array_equal(a[k], b[k]) if isinstance(a[k], np.ndarray) else a[k] == b[k] for k in a)


def small_disk(folder: Path, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `folder` seems to be on a disk of so many bytes, of which its files take theirs."""
    usage = shutil.disk_usage(folder)

    def seeming(_: Path) -> tuple[int, int, int]:
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return usage._replace(free=capacity - used)

    monkeypatch.setattr("shutil.disk_usage", seeming)


@pytest.mark.parametrize("rgb", [False, True])
def test_every_value_survives(tmp_path: Path, rgb: bool) -> None:
    episodes = [made(index, steps=index + 2, rgb=rgb) for index in range(3)]
    write(tmp_path / "d", iter(episodes), ABOUT)
    assert all(same(*pair) for pair in zip(read(tmp_path / "d"), episodes, strict=True))
    about = read_about(tmp_path / "d")
    assert (about.spec, about.task, about.behavior, about.notes) == (SPEC, "block_picking", "expert", {"seed": 3})


def test_frames_are_compressed_without_loss(tmp_path: Path) -> None:
    episodes = [made(index) for index in range(4)]
    write(tmp_path / "d", episodes, ABOUT)
    file = tmp_path / "d" / "data" / "main_data.hdf5"
    assert file.stat().st_size < 0.4 * sum(e.depth.nbytes for e in episodes)
    with h5py.File(file) as data:
        assert data["episode_0/observations/depth"].compression == "gzip"


def test_minari_itself_reads_filters_and_extends_it(tmp_path: Path) -> None:
    write(tmp_path / "d", [made(index) for index in range(3)], ABOUT)
    dataset = minari.MinariDataset(tmp_path / "d" / "data")
    assert (dataset.total_episodes, dataset.total_steps) == (3, 12)
    assert len(dataset.filter_episodes(lambda episode: bool(episode.terminations[-1]))) == 1
    assert dataset.sample_episodes(1)[0].observations["depth"].dtype == np.float32
    more = made(3)
    buffer = EpisodeBuffer(
        observations={"depth": more.depth, "gripper": more.gripper},
        actions=more.action,
        rewards=more.reward,
        terminations=np.array([False] * 3 + [True]),
        truncations=np.zeros(4, bool),
    )
    dataset.storage.update_episodes([buffer])  # one more
    assert [len(episode) for episode in read(tmp_path / "d")] == [4, 4, 4, 4]
    dataset.storage.update_episodes([replace(buffer, id=3)])  # and that one goes on
    with h5py.File(tmp_path / "d" / "data" / "main_data.hdf5") as data:
        assert {data[f"episode_3/{name}"].shape[0] for name in ("actions", "rewards", "terminations")} == {8}
    dataset.storage.update_episodes([replace(buffer, id=0)])  # as does one of ours
    with h5py.File(tmp_path / "d" / "data" / "main_data.hdf5") as data:
        assert data["episode_0/observations/depth"].shape[0] == 10
        assert data["episode_0/actions"].shape[0] == 8


def test_arrays_of_another_precision_are_written_as_the_spaces_say(tmp_path: Path) -> None:
    names, one = ("depth", "gripper", "action", "reward"), made(1)
    wide = replace(one, **{name: getattr(one, name).astype(np.float64) for name in names})
    write(tmp_path / "d", [wide], ABOUT)
    with h5py.File(tmp_path / "d" / "data" / "main_data.hdf5") as data:
        for name in ("observations/depth", "observations/gripper", "actions", "rewards"):
            assert data[f"episode_0/{name}"].dtype == np.float32, name
    assert same(next(read(tmp_path / "d")), one)


def test_a_broken_episode_is_never_written(tmp_path: Path) -> None:
    bad = made(1)
    bad.depth[2, 0, 0] = np.nan
    with pytest.raises(Rejected, match="episode 1, step 2, depth: expected finite"):
        write(tmp_path / "d", [made(0), bad], ABOUT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", [{"task": ""}, {"task": "a\ud800"}, {"dataset_id": "a\nb"}], ids=ascii)
def test_what_policies_could_not_be_known_by_is_refused_before_any_training(told: dict[str, str]) -> None:
    with pytest.raises(Rejected, match=f"{next(iter(told))}: expected printable text"):
        replace(ABOUT, **told)


def test_an_existing_dataset_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "d", [made(0)], ABOUT)
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path / "d", [made(1)], ABOUT)
    assert len(list(read(tmp_path / "d"))) == 1


def test_a_writer_that_dies_leaves_nothing(tmp_path: Path) -> None:
    def dying():  # type: ignore[no-untyped-def]
        yield made(0)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "d", dying(), ABOUT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("episodes", "purpose"), [(1.5, "write episode 0"), (5, "write episode 2"), (9, "compress the data")]
)
def test_a_disk_that_would_fill_up_is_told_before_it_is_full(episodes, purpose, tmp_path, monkeypatch) -> None:
    """HDF5 ends the process where it does while HDF5 writes."""
    small_disk(tmp_path, SPARE_BYTES + int(episodes * made(0).nbytes), monkeypatch)
    with pytest.raises(OSError, match=rf"No space left on device: \d+ MiB are needed to {purpose}") as full:
        write(tmp_path / "d", map(made, range(4)), ABOUT)
    assert full.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EAGAIN])
def test_what_may_not_be_read_now_is_not_called_damaged(number: int, tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "d", [made(0)], ABOUT)

    def refuse(*_: object) -> None:
        raise OSError(number, "not now")

    monkeypatch.setattr("minari.MinariDataset", refuse)
    with pytest.raises(OSError, match="not now"):
        list(read(tmp_path / "d"))


def test_a_dataset_may_move(tmp_path: Path) -> None:
    write(tmp_path / "d", [made(0)], ABOUT)
    shutil.move(tmp_path / "d", tmp_path / "elsewhere")
    assert len(list(read(tmp_path / "elsewhere"))) == 1


def test_an_episode_that_is_cut_was_truncated() -> None:
    whole = made(1, steps=5)
    cut = whole.cut(3)
    assert (len(cut), len(cut.depth), cut.terminated, cut.truncated) == (3, 4, False, True)
    assert whole.cut(9) is whole
