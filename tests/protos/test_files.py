"""Files are whole or absent, and nothing but a file is ever replaced by one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from protos.files import SPARE_BYTES, held, remove_unfinished, require_room, require_writable, whole, write_atomically

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "link").symlink_to("file")
    for content in (b"made", b"written"):
        write_atomically(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == content


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    """As root, `--output /dev/stdout` would leave a file in its place."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no file"):
        write_atomically(tmp_path / "pipe", b"content")
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_links_that_lead_to_themselves_are_an_error_of_the_disk_s(tmp_path):
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    with pytest.raises(OSError, match=r"one|other"):
        write_atomically(tmp_path / "one" / "file", b"content")


def test_what_was_left_unfinished_beside_what_a_link_leads_to_goes(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    scratch = tmp_path / "there" / ".file.abcdefgh"
    scratch.touch()
    remove_unfinished(tmp_path / "link")
    assert not scratch.exists()


def test_what_was_left_unfinished_goes_whatever_the_name(tmp_path):
    scratch = tmp_path / ".run[1].onnx.abcdefgh"
    scratch.touch()
    remove_unfinished(tmp_path / "run[1].onnx")
    assert not scratch.exists()


@pytest.mark.parametrize("name", ["new", "file", "link", "there/new", "nowhere/yet/new"])
def test_what_can_be_written_may_be_asked_for_and_nothing_is_made_by_that(name, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere/else")
    before = sorted(tmp_path.rglob("*"))
    require_writable(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "precious"
    write_atomically(tmp_path / name, b"content")


@pytest.mark.parametrize("name", ["there", "file/new", "/proc/new", "/proc/nowhere/new"])
def test_what_cannot_be_written_is_told_by_its_name(name, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for ask in (require_writable, lambda path: write_atomically(path, b"")):
        with pytest.raises(OSError, match=r"no file|[Nn]o such file|Not a directory|File exists"):
            ask(tmp_path / name)
    with pytest.raises(OSError, match=f"'{tmp_path / name}'"):
        require_writable(tmp_path / name)


@pytest.fixture
def killed(tmp_path) -> Path:
    """What a process has left that was killed while it wrote a folder `d`."""
    dies = "import os, pathlib, protos.files as f\nwith f.whole(pathlib.Path('d')) as made: made.mkdir(); os._exit(9)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", dies], cwd=tmp_path, env=environment, check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    return left


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_takes_its_name_once_it_is_whole_and_on_the_disk(kind, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.fstat(handle).st_ino), fsync(handle)))
    with whole(tmp_path / "d") as made:
        written = made / "data" / "x" if kind == "folder" else made
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text("content")
        assert not (tmp_path / "d").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    there = [tmp_path, tmp_path / "d", *(tmp_path / "d").rglob("*")]
    assert synced == {path.stat().st_ino for path in there}


def test_what_a_killed_writer_left_goes_when_the_next_begins(killed, tmp_path):
    with whole(tmp_path / "d") as made:
        assert not killed.exists()
        made.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_of_two_writers_at_once_neither_takes_the_other_for_a_dead_one(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"), whole(tmp_path / "d") as slow:  # noqa: PT012
        slow.write_text("slow")
        with whole(tmp_path / "d") as quick:
            assert slow.read_text() == "slow"
            quick.write_text("quick")
    assert (tmp_path / "d").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_only_looks_as_if_it_had_been_left_stays(killed, tmp_path):
    (tmp_path / ".d.original").mkdir()
    (tmp_path / ".d.original" / "precious").touch()
    killed.rename(tmp_path / ".another.abcdefgh")
    with whole(tmp_path / "d") as made:
        made.touch()
    assert {path.name for path in tmp_path.iterdir()} == {"d", ".d.original", ".another.abcdefgh"}


def test_a_folder_is_held_by_one_process_and_let_go_of_by_one_that_is_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from protos.files import held"
    code += "\nwith held(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(BlockingIOError), held(tmp_path):
            pass
        other.kill()
    with held(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_with_some_to_spare(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=SPARE_BYTES + 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    require_room(tmp_path, 10, "sing")
    with pytest.raises(OSError, match="No space left on device: 32 MiB are needed to sing, 32 are free"):
        require_room(tmp_path, 11, "sing")
