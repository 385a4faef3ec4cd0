"""The demo's directory: what an earlier demo left goes before this one begins, what others left stays."""

import sys
from pathlib import Path

import pytest

from training.demo import Stages, main


@pytest.fixture(autouse=True)
def _fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_stages: Stages, name: str, *_command: str) -> None:
        raise RuntimeError(f"{name} failed")

    monkeypatch.setattr(Stages, "run", fail)


def demo(output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(output), *flags])
    return main()


def fill(output: Path) -> list[Path]:
    """What a demo leaves, in small."""
    files = [
        output / name for name in ("data/it", "train/config.json", ".data.partial/it", "policy.onnx", "report.json")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return files


@pytest.mark.parametrize("name", ["data/it", "train/config.json", "policy.onnx", "report.json"])
def test_what_no_demo_left_is_not_removed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make demo OUTPUT=.` beside a train/ of one's own."""
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("{}")
    assert demo(tmp_path, monkeypatch) == 1
    said = capsys.readouterr().err
    assert f"--output: expected a directory of its own, got {name.partition('/')[0]} in" in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]


def test_nothing_of_an_earlier_demo_survives_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its policy and its report would look like the new one's."""
    assert demo(tmp_path, monkeypatch) == 1
    files = fill(tmp_path)
    assert demo(tmp_path, monkeypatch) == 1
    assert capsys.readouterr().err.count("the demo stopped: collect failed") == 2
    assert not [file for file in files if file.exists()]


@pytest.mark.parametrize(
    "wrong",
    [
        ("--episodes", "0"),
        ("--episodes", "1000001"),
        ("--minutes", "-1"),
        ("--minutes", "nan"),
        ("--eval-episodes", "0"),
        ("--eval-episodes", "100001"),
        ("--seed", "700"),
    ],
)
def test_what_its_commands_would_refuse_removes_nothing(
    wrong: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo(tmp_path, monkeypatch)
    files = fill(tmp_path)
    with pytest.raises(SystemExit):
        demo(tmp_path, monkeypatch, *wrong)
    assert wrong[0] in capsys.readouterr().err
    assert all(file.exists() for file in files)
