"""A run that stopped: what it says to do is what helps."""

import errno
import json
import os
import shlex
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from protos.errors import Rejected
from protos.files import held
from tests.training.test_run import arguments, begun, same, weights
from training.agents.agent import Diverged
from training.config import RunConfig, parse
from training.data.dataset import load
from training.distributed import to_resume
from training.loop import CHECKPOINT, DIAGNOSIS, Run
from training.progress import describe
from training.run import _record, _without_evaluation, main, train


def as_told(text: str) -> RunConfig:
    """What the command at the end of `text` asks for."""
    command = shlex.split(text[text.index("python -m training.run") :])
    return parse(command[3:])


def run_command(monkeypatch: pytest.MonkeyPatch, args: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["training.run", *args])
    return main()


def test_too_large_a_batch_is_no_traceback(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a processor's memory torch says RuntimeError."""
    flags = ("--batch-size", str(10**15), "--updates", "1", "--augmentation", "none")
    assert run_command(monkeypatch, arguments(reach_path, tmp_path / "run", *flags)) == 1
    said = capsys.readouterr().err
    assert "can't allocate memory" in said
    assert "--batch-size" in said
    assert "--device" not in said


def test_where_another_process_has_ended_its_own_words_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(_: RunConfig) -> None:
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:23218.")

    monkeypatch.setattr("training.run.train", lost)
    assert run_command(monkeypatch, arguments(tmp_path, tmp_path / "run")) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "Connection closed by peer" in said
    assert "if another of its processes has ended, it says why" in said


def test_copies_of_which_the_data_were_made_go_back_to_the_kernel(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept, as activations are, they would be a second data set in memory for as long as the run lasts."""
    order = []
    monkeypatch.setattr("training.run.keep_freed_memory", lambda: order.append("keep"))
    monkeypatch.setattr("training.run._train", lambda *_: order.append("train"))
    monkeypatch.setattr("training.loop.load", lambda *a, **k: order.append("load") or load(*a, **k))
    train(parse(arguments(reach_path, tmp_path / "run", "--updates", "1")))
    assert order == ["load", "keep", "train"]


def test_a_second_run_does_not_train_into_the_directory_of_one_under_way(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    args = arguments(reach_path, output, "--updates", "1")
    begun(args)
    before = (output / CHECKPOINT).read_bytes()
    with held(output):
        assert run_command(monkeypatch, [*args, "--resume", "--updates", "2"]) == 1
    assert "in which no run is under way" in capsys.readouterr().err
    assert (output / CHECKPOINT).read_bytes() == before


def test_of_two_that_begin_at_once_the_later_refuses(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has come and gone while this one read its data."""
    output = tmp_path / "run"
    args = arguments(reach_path, output, "--updates", "1")
    other = parse(args)

    def meanwhile(*a: Any, **k: Any) -> Any:
        if not output.exists():
            _record(other)
        return load(*a, **k)

    monkeypatch.setattr("training.loop.load", meanwhile)
    with pytest.raises(Rejected, match="a new or empty directory"):
        train(parse(args))


def test_a_disk_that_fills_up_is_told_with_the_way_on_and_what_was_learned_is_saved(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As TensorBoard's writer says it: without a name."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "run"
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    assert run_command(monkeypatch, arguments(reach_path, output, "--updates", "40")) == 1
    said = capsys.readouterr().err
    assert f"No space left on device, of what lies in {output}" in said
    assert as_told(said).output == output
    assert torch.load(output / CHECKPOINT, weights_only=True)["updates"] == 20


def test_a_thread_s_failure_to_write_is_the_loop_s_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def threads(_: RunConfig) -> None:
        for error in (OSError("disk"), ValueError("a bug")):
            thread = threading.Thread(target=lambda error=error: exec("raise error", {"error": error}))
            thread.start()
            thread.join()

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has one of its own
    monkeypatch.setattr("training.run.train", threads)
    run_command(monkeypatch, arguments(tmp_path, tmp_path / "run"))
    said = capfd.readouterr().err
    assert "a bug" in said
    assert "disk" not in said


def test_sigterm_before_the_first_update_is_told_as_ctrl_c_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("training.run.train", lambda _: signal.raise_signal(signal.SIGTERM))
    assert run_command(monkeypatch, arguments(tmp_path, tmp_path / "run")) == 130
    assert "interrupted before the first update" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_of_a_gpu_s_is_resumed_elsewhere_by_the_flag_that_is_named(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = arguments(reach_path, tmp_path / "run", "--updates", "1")
    _record(replace(parse(args), device="cuda"))
    with pytest.raises(Rejected, match="add --device cpu"):
        train(parse([*args, "--resume"]))
    assert Run(parse([*args, "--resume", "--device", "cpu"])).device.type == "cpu"


def test_data_that_have_moved_are_named_anew(reach_path: Path, tmp_path: Path) -> None:
    begun(arguments(reach_path, tmp_path / "run", "--updates", "2"))
    with pytest.raises(Rejected, match="say --dataset PLACE"):
        train(parse(arguments(tmp_path / "gone", tmp_path / "run", "--updates", "2", "--resume")))


def test_a_precision_that_the_new_processor_has_not_is_told_of(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--precision auto: the weights are not what they would have been on the first one."""
    args = arguments(reach_path, tmp_path / "run", "--updates", "2")
    monkeypatch.setattr("training.loop._bf16", lambda *_: True)
    begun(args)
    monkeypatch.setattr("training.loop._bf16", lambda *_: False)
    run = Run(parse([*args, "--resume"]))
    run.restore()
    describe(run)
    told = capsys.readouterr()
    assert "cpu, fp32" in told.out
    assert "it learned in bf16 so far" in told.err


def test_a_rate_without_a_budget_to_fall_over_is_told_of(
    reach_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(reach_path, tmp_path / "run", "--minutes", "None", "--eval-every", "5", "--patience", "2")
    describe(Run(parse(args)))
    assert "nothing for --schedule cosine to fall over" in capsys.readouterr().err


def test_too_little_memory_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: RunConfig) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("training.run.train", full)
    assert run_command(monkeypatch, arguments(tmp_path, tmp_path / "run")) == 1
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
