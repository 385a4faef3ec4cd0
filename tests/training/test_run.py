"""The training command: budgets, resume, interruption, and errors that say what to do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protos.errors import Rejected
from training.agents.bc import BC
from training.agents.iql import IQLConfig
from training.config import parse
from training.loop import Run
from training.run import _record, main, train

SMALL_RUN = ("--network.fields", "4", "8", "8", "--network.hidden", "8", "--batch-size", "8")


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    return ["--dataset", str(data), "--output", str(output), *SMALL_RUN, *more]


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path / "checkpoint.pt", weights_only=True)["learner"]["agent"]
    return state


def to_its_end(run: Run) -> Run:
    """What `train` does without its curves and its export, which takes longer than such a run."""
    while run.progress < 1:
        run.step()
    run.save()
    return run


def begun(args: list[str]) -> None:
    """A run stopped after its first update."""
    run = Run(parse(args))
    _record(run.config)
    run.step()
    run.save()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("bc", "fp32"),
        ("bc", "bf16"),
        ("iql", "fp32"),
        ("cql", "fp32"),
        ("iql --iql.values-first 0.3", "fp32"),
        ("iql --iql.values-first 0.3", "bf16"),
        ("iql --iql.values-first 0.7", "fp32"),  # values rest after the checkpoint, above before it
        ("cql --cql.values-first 0.3", "fp32"),
        ("cql --cql.values-first 0.3", "bf16"),
    ],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does_bit_for_bit(
    flags: str, precision: str, reach_path: Path, tmp_path: Path
) -> None:
    options = ("--algo", *flags.split(), "--updates", "8", "--precision", precision)
    to_its_end(Run(parse(arguments(reach_path, tmp_path / "whole", *options))))
    config = parse(arguments(reach_path, tmp_path / "halves", *options))
    first = Run(config)
    for _ in range(4):
        first.step()
    first.save()
    first.step()  # lost when the process is killed
    second = Run(config)
    second.restore()
    assert to_its_end(second).updates == 8
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "halves"))


@pytest.mark.usefixtures("without_export")
def test_ctrl_c_in_the_middle_of_an_update_lets_it_finish(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--updates", "6")
    to_its_end(Run(parse(arguments(reach_path, tmp_path / "whole", *options))))
    follow = BC.follow  # runs inside an update

    def interrupted(agent: BC) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        follow(agent)

    with monkeypatch.context() as patched:
        patched.setattr(BC, "follow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(parse(arguments(reach_path, tmp_path / "halves", *options)))
    assert torch.load(tmp_path / "halves" / "checkpoint.pt", weights_only=True)["updates"] == 1
    capsys.readouterr()
    for used_up in (False, True):
        train(parse(["--resume", "--output", str(tmp_path / "halves")]))
        assert ("the budget is used up" in capsys.readouterr().out) is used_up
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "halves"))


def test_resuming_keeps_the_run_s_settings_but_may_extend_its_budget(reach_path: Path, tmp_path: Path) -> None:
    first = parse(arguments(reach_path, tmp_path, "--updates", "3", "--learning-rate", "0.01", "--algo", "iql"))
    _record(first)
    resumed = parse(["--resume", "--output", str(tmp_path), "--minutes", "2"])
    assert resumed == replace(first, resume=True, minutes=2.0, updates=None)


@pytest.mark.parametrize("flags", [("--learning-rate", "0.5"), ("--algo", "iql"), ("--network.hidden", "9")])
def test_resuming_with_other_settings_is_refused(flags: tuple[str, str], reach_path: Path, tmp_path: Path) -> None:
    _record(parse(arguments(reach_path, tmp_path, "--updates", "3")))
    with pytest.raises(Rejected, match=f"^{flags[0]}: .*as the run was started"):
        parse(["--resume", "--output", str(tmp_path), *flags])


def test_another_algorithm_s_setting_is_no_setting(reach_path: Path, tmp_path: Path) -> None:
    args = arguments(reach_path, tmp_path, "--updates", "3", "--iql.values-first", "0.2")
    with pytest.raises(ValueError, match=r"--iql\.values-first means nothing to --algo bc: add --algo iql"):
        parse(args)
    assert parse([*args, "--algo", "iql"]).iql.values_first == 0.2


def test_a_run_that_could_not_start_leaves_its_output_free(reach_path: Path, tmp_path: Path) -> None:
    for wrong in (
        arguments(tmp_path / "mistyped", tmp_path / "out", "--updates", "1"),
        arguments(reach_path, tmp_path / "out", "--updates", "1", "--network.pool", "1"),
    ):
        with pytest.raises(Rejected):
            train(parse(wrong))
        assert not (tmp_path / "out").exists()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(reach_path: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        to_its_end(Run(parse(arguments(reach_path, tmp_path / name, "--updates", "3", "--seed", seed))))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)


def test_a_run_leaves_a_policy_its_settings_and_its_curves(reach_path: Path, tmp_path: Path) -> None:
    flags = ("--updates", "25", "--equivariance", "actor", "--algo", "iql")
    train(parse(arguments(reach_path, tmp_path / "run", *flags)))
    assert {"policy.onnx", "config.json", "checkpoint.pt", "tensorboard"} == {
        p.name for p in (tmp_path / "run").iterdir()
    }
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["equivariance"], settings["updates"], settings["minutes"]) == ("actor", 25, None)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    curves.Reload()
    assert {"losses/actor", "losses/critic", "losses/value", "values/q", "time/update_ms"} <= set(
        curves.Tags()["scalars"]
    )


def test_minutes_are_a_budget_too(reach_path: Path, tmp_path: Path) -> None:
    run, before = Run(parse(arguments(reach_path, tmp_path / "run", "--minutes", "0.02"))), 0.0
    while run.progress < 1:
        before = run.seconds
        run.step()
    assert before < 60 * 0.02 <= run.seconds


def test_ctrl_c_saves_and_says_how_to_go_on(reach_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    args = arguments(reach_path, output, "--updates", "100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "training.run", *args, "--checkpoint-s", "0.1"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (output / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"python -m training.run --resume --output {output}" in said
    assert torch.load(output / "checkpoint.pt", weights_only=True)["updates"] > 0


SE2 = ("--augmentation", "se2")


def test_errors_say_what_to_do(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("something")
    begun_there = tmp_path / "begun"
    begun_there.mkdir()
    _record(parse(arguments(reach_path, begun_there, "--updates", "1")))
    for args, words in (
        (arguments(tmp_path / "nowhere", tmp_path / "x", "--updates", "1"), "sim_client.collect"),
        (arguments(reach_path, used, "--updates", "1"), "a new or empty directory"),
        (arguments(reach_path, tmp_path / "y", "--updates", "1", "--resume"), "start one without --resume"),
        (arguments(reach_path, tmp_path / "w", "--updates", "1", *SE2, "--shift-m", "0.3"), "less than 0.225 m"),
        (arguments(reach_path, begun_there, "--updates", "1"), "or add --resume"),
        (arguments(reach_path, tmp_path / "z", "--updates", "0"), "must be positive"),
    ):
        monkeypatch.setattr(sys, "argv", ["training.run", *args])
        with pytest.raises(SystemExit) as ended:
            sys.exit(main())
        assert ended.value.code in (1, 2)
        assert words in capsys.readouterr().err


def test_resuming_with_other_data_is_refused(reach_path: Path, tmp_path: Path) -> None:
    from tests.training.conftest import write_dataset

    output = tmp_path / "run"
    begun(arguments(reach_path, output, "--updates", "2"))
    other = write_dataset(tmp_path / "other", episodes=5)
    with pytest.raises(Rejected, match="resume with the same data"):
        train(parse(arguments(other, output, "--updates", "2", "--resume")))


def test_help_teaches_without_loading_e2cnn() -> None:
    code = "import atexit, sys, training.run as r; atexit.register(lambda: print('e2cnn' in sys.modules)); r.main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    for words in ("--dataset", "--equivariance", "--preset", "--resume", "Example"):
        assert words in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(("preset", "batch"), [("cpu", 32), ("gpu", 128), ("paper", 8)])
def test_presets_are_files_and_flags_override_them(preset: str, batch: int) -> None:
    plain = parse(["--dataset", "d", "--output", "o", "--preset", preset])
    assert (plain.preset, plain.batch_size) == (preset, batch)
    changed = parse(["--dataset", "d", "--output", "o", "--preset", preset, "--batch-size", "5", "--updates", "7"])
    assert (changed.batch_size, changed.updates, changed.minutes) == (5, 7, None)
    assert changed.network == plain.network


def test_a_preset_may_be_your_own_file_and_a_wrong_one_says_what_there_is(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("minutes: 3\nbatch_size: 6\niql:\n  expectile: 0.7\nnetwork:\n  group: C4\n")
    config = parse(
        ["--dataset", "d", "--output", "o", "--preset", str(mine), "--algo", "iql", "--iql.temperature", "2"]
    )
    assert (config.batch_size, config.network.group) == (6, "C4")
    assert (config.iql.expectile, config.iql.temperature) == (0.7, 2.0)
    with pytest.raises(Rejected, match="cpu, gpu, paper"):
        parse(["--dataset", "d", "--output", "o", "--preset", "fast"])
    mine.write_text("batch_size: 6\n")
    with pytest.raises(ValueError, match="when to stop"):
        parse(["--dataset", "d", "--output", "o", "--preset", str(mine)])
    mine.write_text("batch: 6\n")
    with pytest.raises(Rejected, match=r"there is no batch; did you mean batch_size\?"):
        parse(["--dataset", "d", "--output", "o", "--preset", str(mine)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("augmentation: O2", "augmentation = 'O2'"),
        ("batch_size: 32.0", "batch_size = 32.0"),
        ("learning_rate: 1e-4", "write 1.0e-4"),
        ("failures: Drop", "failures = 'Drop'"),
        ("network:\n  fields: 3", "fields = 3"),
        ("network: [1]", "network = "),
        ("iql:\n  expectile: high", "expectile = 'high'"),
        ("network: [", "flow node"),
        ("schedule: cosin", "schedule = 'cosin'"),
        ("network:\n  fields: [4, 8.5]", "fields = (4, 8.5)"),
        ("network:\n  fields: [4, true]", "fields = (4, True)"),
        ("updates: true", "updates = True"),
        ("discount: .nan", "--discount must be a finite number"),
        ("resume: true", "resume: only for the command line"),
        ("preset: paper", "preset: only for the command line"),
    ],
)
def test_a_preset_of_ones_own_is_checked(text: str, words: str, tmp_path: Path) -> None:
    """A flag's choices are; what a file said was taken as it was, and meant something else without a word."""
    (tmp_path / "mine.yaml").write_text(f"minutes: 3\n{text}\n")
    with pytest.raises(Rejected, match=re.escape(words)):
        parse(["--dataset", "d", "--output", "o", "--preset", str(tmp_path / "mine.yaml")])


def test_a_preset_may_say_where_a_run_goes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("minutes: 3\noutput: runs/mine\n")
    words = ["--dataset", "d", "--preset", str(tmp_path / "mine.yaml")]
    assert parse(words).output == Path("runs/mine")
    with pytest.raises(Rejected, match="--resume: expected --output"):  # else its own settings would not be looked at
        parse([*words, "--resume"])


@pytest.mark.parametrize(
    "flag", ["--cql.conservative-weight", "--cql.target-entropy", "--cql.gap", "--learning-rate", "--minutes"]
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_no_finite_number_is_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--dataset", "d", "--output", "o", "--algo", "cql", flag, value])
    assert f"{flag} must be a finite number" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("text", ["", "- minutes: 3\n"])
def test_a_preset_without_settings_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(Rejected, match="holds no settings by name"):
        parse(["--dataset", "d", "--output", "o", "--preset", str(tmp_path / "mine.yaml")])


def test_a_word_of_a_preset_is_not_taken_for_a_number(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("minutes: 3\nschedule: cosin\n")
    with pytest.raises(Rejected) as refused:
        parse(["--dataset", "d", "--output", "o", "--preset", str(tmp_path / "mine.yaml")])
    assert "1.0e-4" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ("--shift-m 0.01", "--augmentation se2"),
        ("--shift-m 0.01 --augmentation o2", "--augmentation se2"),
        ("--eval-episodes 10", "--eval-every"),
        ("--keep last", "--eval-every"),
        ("--algo cql --cql.gap-rate 2", "--cql.gap"),
        ("--algo cql --cql.entropy fixed --cql.target-entropy=-3", "--cql.entropy learned"),
        ("--algo cql --preset paper --cql.cloning-temperature 1", "--cql.cloning-weight"),
        ("--algo cql --preset paper --cql.largest-weight 9", "--cql.cloning-weight"),
    ],
)
def test_a_flag_that_nothing_reads_is_refused(flags: str, missing: str) -> None:
    words = ["--dataset", "d", "--output", "o", *flags.split()]
    with pytest.raises(ValueError, match=f"means nothing without {missing}"):
        parse(words)
    parse([*words, *missing.split(), *(() if " " in missing else ("5",))])


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--discount 0.5", "to --algo bc"),
        ("--n-step 3", "to --algo bc"),
        ("--network.critic-width 3", "to --algo bc"),
        ("--algo iql --iql.values-first 0.2 --iql.warm-up 7", "with --iql.values-first"),
    ],
)
def test_a_flag_that_another_makes_void_is_refused(flags: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"means nothing {why}"):
        parse(["--dataset", "d", "--output", "o", *flags.split()])


def test_an_export_alone_does_not_change_how_a_run_learned(reach_path: Path, tmp_path: Path) -> None:
    run = to_its_end(Run(parse(arguments(reach_path, tmp_path, "--updates", "1"))))
    run.learned_in_bf16 = not run.bf16
    run.save()
    _record(run.config)
    again = Run(parse(["--resume", "--output", str(tmp_path)]))
    again.restore()
    again.save()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["bf16"] is not run.bf16


def test_a_gap_of_nothing_is_a_gap() -> None:
    assert (
        parse(["--dataset", "d", "--output", "o", "--algo", "cql", "--cql.gap", "0", "--cql.gap-rate", "2"]).cql.gap
        == 0
    )


def test_a_seed_that_torch_cannot_take_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--dataset", "d", "--output", "o", "--seed", str(2**64)])
    assert "below 2^64" in capsys.readouterr().err


def test_a_heading_without_settings_is_none(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("minutes: 3\niql:\n  # expectile: 0.7\n")
    config = parse(["--dataset", "d", "--output", "o", "--preset", str(tmp_path / "mine.yaml")])
    assert config.iql == IQLConfig()


def test_the_paper_preset_is_the_paper_s() -> None:
    config = parse(["--dataset", "d", "--output", "o", "--preset", "paper"])
    assert (config.updates, config.batch_size, config.learning_rate, config.discount) == (100_000, 8, 1e-4, 0.99)
    assert (config.n_step, config.network.group, config.network.pool, config.network.critic_width) == (1, "C8", 1, 1.0)
    assert (config.iql.expectile, config.iql.temperature, config.iql.target_rate) == (0.8, 0.5, 5e-3)
    assert (config.cql.conservative_weight, config.cql.proposals, config.cql.cloning_weight) == (1.0, 10, 0.0)
    assert (config.cql.entropy, config.cql.entropy_temperature, config.cql.target_entropy) == ("learned", 0.01, None)
