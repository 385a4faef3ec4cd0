"""The commands that draw, for people: what cannot be written is told in a line, before the work."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sim_client import look, survey


@pytest.mark.parametrize(("main", "file"), [(look.main, "x.png"), (survey.main, "x.md")], ids=["look", "survey"])
@pytest.mark.parametrize("folder", ["file", "/proc/nowhere"])
def test_a_place_that_cannot_be_written_is_told_before_any_scene_is_made(
    main: Callable[[], int], file: str, folder: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("gymnasium.make", None)
    monkeypatch.setattr(survey, "ProcessPoolExecutor", None)
    path = tmp_path / folder / file
    monkeypatch.setattr(sys, "argv", ["command", "--output", str(path)])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped: ")
    assert line.endswith(f"'{path}'")


def test_pictures_that_cannot_be_written_are_told_as_soon_as_the_page(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "images").touch()
    monkeypatch.setattr(survey, "ProcessPoolExecutor", None)
    monkeypatch.setattr(sys, "argv", ["survey", "--output", str(tmp_path / "tasks.md")])
    assert survey.main() == 2
    assert "images/" in capsys.readouterr().err


def test_a_kind_of_picture_that_nobody_can_draw_is_refused_with_those_that_can_be(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["look", "--output", "x.foo"])
    with pytest.raises(SystemExit) as refused:
        look.main()
    assert refused.value.code == 2
    assert "png" in capsys.readouterr().err
    for name in ("x.PNG", "x.svg", "x"):
        look.Look(Path(name))


@pytest.mark.parametrize("command", [look, survey], ids=["look", "survey"])
def test_a_ctrl_c_is_a_line_and_no_traceback(command: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gymnasium.make", interrupt)
    monkeypatch.setattr(survey, "ProcessPoolExecutor", interrupt)
    monkeypatch.setattr(sys, "argv", ["command", "--output", str(tmp_path / "x")])
    assert command.main() == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("killed", ["worker", "command"])
def test_who_is_killed_leaves_no_traceback_and_no_worker(killed: str, tmp_path: Path) -> None:
    """By the kernel, where memory is short."""
    command = [sys.executable, "-m", "sim_client.survey", "--tasks", "block_picking", "--episodes", "100000"]
    asked = ["--workers", "1", "--output", str(tmp_path / "tasks.md")]
    with subprocess.Popen([*command, *asked], stderr=subprocess.PIPE, text=True) as process:
        children, ends = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
        while not (worker := [pid for pid in map(int, children.read_text().split()) if _spawned(pid)]):
            assert time.monotonic() < ends
            time.sleep(0.05)
        os.kill(worker[0] if killed == "worker" else process.pid, signal.SIGKILL)
        if killed == "worker":
            assert process.wait(60) == 2
            assert "\nstopped: " in process.stderr.read().replace("\r", "\n")
    while Path(f"/proc/{worker[0]}").exists():
        assert time.monotonic() < ends, "the worker stays for ever"
        time.sleep(0.05)


def _spawned(pid: int) -> bool:
    """A worker of multiprocessing that waits for the end of its parent, not the tracker of resources."""
    try:
        threads = len([*Path(f"/proc/{pid}/task").iterdir()])
        return threads > 1 and "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return False
