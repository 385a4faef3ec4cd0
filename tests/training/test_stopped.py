"""A run that stopped: what it says to do is what helps."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protos.errors import Rejected
from tests.training.test_run import arguments, begun, same, weights
from training.agents.agent import Diverged
from training.config import RunConfig, parse
from training.distributed import to_resume
from training.loop import CHECKPOINT, DIAGNOSIS, Run
from training.run import _record, _without_evaluation, main, train


def as_told(text: str) -> RunConfig:
    """What the command at the end of `text` asks for."""
    command = shlex.split(text[text.index("python -m training.run") :])
    return parse(command[3:])


def test_too_little_memory_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: RunConfig) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("training.run.train", full)
    monkeypatch.setattr(sys, "argv", ["training.run", *arguments(tmp_path, tmp_path / "run")])
    assert main() == 1
    said = capsys.readouterr().err
    assert all(words in said for words in ("20.00 GiB", "--batch-size", "--network.fields", "--device cpu"))


@pytest.mark.usefixtures("without_export")
def test_a_run_killed_while_it_wrote_its_settings_may_start_again(reach_path: Path, tmp_path: Path) -> None:
    (tmp_path / ".config.json.k1ll3dxx").write_text("{")
    train(parse(arguments(reach_path, tmp_path, "--updates", "1")))
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("budget", [7, None])
def test_where_evaluation_fails_the_command_that_does_without_it_is_one(
    budget: int | None, reach_path: Path, tmp_path: Path
) -> None:
    flags = ("--updates", "7", "--eval-every", "3", "--patience", "2")
    config = replace(parse(arguments(reach_path, tmp_path / "a run", *flags)), updates=budget)
    _record(config)
    run = Run(config)
    run.step()
    assert as_told(_without_evaluation(run)) == replace(
        config, resume=True, eval_every=None, patience=None, updates=budget or 1
    )


@pytest.mark.usefixtures("without_export")
def test_a_run_that_diverged_names_the_command_that_exports_its_checkpoint(reach_path: Path, tmp_path: Path) -> None:
    evaluated = ("--eval-every", "3", "--patience", "2")
    config = parse(arguments(reach_path, tmp_path, "--updates", "9", "--algo", "iql", *evaluated))
    _record(config)
    run = Run(config)
    run.step()
    run.save()
    good = weights(tmp_path)
    run.dataset.reward[:] = float("nan")
    with pytest.raises(Diverged, match="to a policy from it: ") as diverged:
        run.step()
    next(run.learner.agent.parameters()).data[0] = float("inf")
    with pytest.raises(Diverged, match="to a policy from it: "):
        run.save()
    told = as_told(str(diverged.value))
    assert told.eval_every is None  # else the best snapshot would be exported, if there is one
    train(told)
    assert same(weights(tmp_path), good)


def test_weights_that_cannot_be_drawn_by_are_explained_without_a_batch(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> None:
        raise Diverged("the weights of recorded actions are not finite, or all 0", {"values/weight": 0.0})

    monkeypatch.setattr("training.loop.weigh", nothing)
    flags = ("--updates", "2", "--algo", "cql", "--cql.cloning-weight", "1", "--cql.values-first", "0.5")
    run = Run(parse(arguments(reach_path, tmp_path, *flags)))
    run.step()
    run.save()
    with pytest.raises(
        Diverged, match=r"Start a new run with a larger --cql\.cloning-temperature.*is kept$"
    ) as diverged:
        run.step()
    assert "batch" not in str(diverged.value)
    told = json.loads((tmp_path / DIAGNOSIS).read_text())
    assert (told["update"], told["scalars"]) == (1, {"values/weight": "0.0"})
    assert "batch" not in told


def test_a_diagnosis_goes_once_its_update_went_well(reach_path: Path, tmp_path: Path) -> None:
    run = Run(parse(arguments(reach_path, tmp_path, "--updates", "9")))
    (tmp_path / DIAGNOSIS).write_text(json.dumps({"update": 1}))
    for there in (True, False):
        run.step()
        run.save()
        assert (tmp_path / DIAGNOSIS).exists() == there


def test_another_file_of_a_run_is_no_checkpoint(reach_path: Path, tmp_path: Path) -> None:
    run = Run(parse(arguments(reach_path, tmp_path, "--updates", "9")))
    run.write(CHECKPOINT, {"agent": run.learner.agent.state_dict()})  # as best.pt holds it
    with pytest.raises(Rejected, match=r"checkpoint\.pt: expected a checkpoint of training\.run"):
        run.restore()


def test_settings_that_cannot_be_read_are_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").mkdir()
    monkeypatch.setattr(sys, "argv", ["training.run", "--resume", "--output", str(tmp_path)])
    assert main() == 2
    assert "config.json" in capsys.readouterr().err


def test_a_run_is_resumed_by_as_many_processes(reach_path: Path, tmp_path: Path) -> None:
    args = arguments(reach_path, tmp_path, "--updates", "9")
    begun(args)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["processes"] == 1
    torch.save(state | {"processes": 2}, tmp_path / CHECKPOINT)
    with pytest.raises(Rejected, match="2, as the run was started, got 1; resume with torchrun --nproc-per-node 2"):
        Run(parse(args)).restore()
    whole = Run(parse(arguments(reach_path, tmp_path, "--updates", "1")))
    whole.restore()  # nothing is left but the export
    whole.save()
    with pytest.raises(Rejected, match="2, as the run was started, got 1"):
        Run(parse(args)).restore()
    del state["processes"]  # as in older checkpoints
    torch.save(state, tmp_path / CHECKPOINT)
    Run(parse(args)).restore()


@pytest.mark.parametrize(
    ("world", "here", "started"),
    [
        ("1", "1", "python"),
        ("4", "4", "torchrun --standalone --nproc-per-node 4"),
        ("4", "2", "torchrun --nnodes 2 ... --nproc-per-node 2"),
    ],
)
def test_how_to_go_on_is_told_in_the_form_in_which_a_run_was_started(
    world: str, here: str, started: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert to_resume(Path("a run")) == f"{started} -m training.run --resume --output 'a run'"
