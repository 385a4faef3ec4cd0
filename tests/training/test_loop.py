"""The loop's promises: divergence is explained, processes share a batch, probes see what they claim to see."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protos.errors import Rejected
from protos.symmetry import QUARTER_TURNS
from tests.training.conftest import set_apart, write_dataset
from tests.training.one_agent import DIVERGES, REFUSED, WHOLE
from tests.training.test_run import arguments, begun, same, to_its_end, weights
from training.agents.agent import Diverged
from training.config import parse
from training.data.dataset import load
from training.diagnostics import Probe
from training.distributed import Processes, _device
from training.loop import Run, saved
from training.progress import describe
from training.run import main, train


def test_a_diverging_run_names_losses_batch_and_cause_and_keeps_its_checkpoint(
    reach_path: Path, tmp_path: Path
) -> None:
    run = Run(parse(arguments(reach_path, tmp_path, "--updates", "9", "--algo", "iql")))
    run.step()
    run.save()
    good = weights(tmp_path)
    run.dataset.reward[:] = float("nan")
    with pytest.raises(Diverged, match=r"losses/critic.* not finite at update 1; the batch's reward are not finite"):
        run.step()
    told = json.loads((tmp_path / "diverged.json").read_text())
    assert told["not finite in the batch"] == ["reward"]
    assert told["scalars"]["losses/critic"] == "nan"
    assert len(told["batch"]) == 8
    assert all(0 <= row["episode"] < run.dataset.episodes and 0 <= row["step"] < 4 for row in told["batch"])
    assert all(torch.equal(good[name], value) for name, value in weights(tmp_path).items())


def test_the_command_stops_with_the_diagnosis_and_no_traceback(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ("--learning-rate", "1e30", "--updates", "50", "--algo", "iql", "--schedule", "constant")
    monkeypatch.setattr(sys, "argv", ["training.run", *arguments(reach_path, tmp_path / "run", *wild)])
    assert main() == 1
    said = capsys.readouterr().err
    assert "training stopped" in said
    assert "lower --learning-rate" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "policy.onnx").exists()


def test_a_batch_is_shared_out_among_processes_or_refused() -> None:
    assert Processes(0, 4).share(32) == 8
    with pytest.raises(Rejected, match=r"--batch-size: expected a multiple of the 3 processes"):
        Processes(0, 3).share(32)


RUNS = {
    "cql": ("cql",),
    "iql": ("iql", "--iql.values-first", "0.5"),
    DIVERGES: ("iql",),
    REFUSED: ("bc", "--eval-every", "3"),
    WHOLE: ("cql",),
}


@pytest.fixture(scope="module")
def together(reach_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where two processes learned, by the names above, and what they said: torchrun takes longer than all of it."""
    home = tmp_path_factory.mktemp("together")
    runs = {
        name: arguments(reach_path, home / name, "--updates", "6", "--threads", "1", "--algo", *flags)
        for name, flags in RUNS.items()
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.training.one_agent", json.dumps(runs)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return home, done.stdout


@pytest.mark.parametrize("name", ["cql", "iql"])
def test_two_processes_train_one_agent(name: str, together: tuple[Path, str]) -> None:
    _, said = together
    first, second = (re.findall(rf"{name}: rank {rank} has (\w{{64}})", said) for rank in (0, 1))
    assert first == second
    assert len(first) == 1
    first, second = (re.findall(rf"{name}: rank {rank} drew (\w{{64}})", said) for rank in (0, 1))
    assert first != second, "each learns from transitions of its own"


def test_where_one_of_two_processes_diverges_both_stop_and_one_says_why(together: tuple[Path, str]) -> None:
    home, said = together
    stopped = dict(re.findall(rf"{DIVERGES}: rank (\d) stopped: (.*)", said))
    assert "another process" in stopped["0"]
    assert "losses/critic" in stopped["1"]
    assert "losses/critic" in json.loads((home / DIVERGES / "diverged.json").read_text())["what"]


def test_of_two_processes_one_logs_saves_and_exports(together: tuple[Path, str]) -> None:
    home, said = together
    assert "2 processes" in said
    assert said.count("policy.onnx") == 1
    assert torch.load(home / WHOLE / "checkpoint.pt", weights_only=True)["updates"] == 6
    assert (home / WHOLE / "policy.onnx").exists()
    assert len(list((home / WHOLE / "tensorboard").iterdir())) == 1


def test_processes_that_cannot_be_evaluated_all_say_so(together: tuple[Path, str]) -> None:
    """Or the others would meet a leader that has left."""
    home, said = together
    refusals = dict(re.findall(rf"{REFUSED}: rank (\d) refused: (.*)", said))
    assert refusals.keys() == {"0", "1"}
    assert all("--eval-every" in refusal for refusal in refusals.values())
    assert not (home / REFUSED).exists()


def test_more_processes_than_gpus_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Rejected, match="--nproc-per-node"):
        _device("auto", 1)


def test_the_bound_on_values_is_that_of_returns_however_many_steps_a_reward_sums(tmp_path: Path) -> None:
    def paid_at_each_step(_index: int, episode: dict[str, Any]) -> None:
        episode["reward"] = [1.0] * len(episode["reward"])

    data = write_dataset(tmp_path / "data", edit=paid_at_each_step)
    for n in (1, 2):
        flags = ("--algo", "iql", "--n-step", str(n), "--discount", "0.5")
        run = Run(parse(arguments(data, tmp_path / str(n), *flags)))
        assert run.learner._value_bound == pytest.approx(10 / (1 - 0.5))


def test_weights_that_are_no_numbers_are_not_saved_over_the_last_that_were(reach_path: Path, tmp_path: Path) -> None:
    """Losses may be finite where a gradient is not."""
    run = Run(parse(arguments(reach_path, tmp_path, "--updates", "9")))
    run.step()
    run.save()
    good = weights(tmp_path)
    next(run.learner.agent.parameters()).data[0] = float("inf")
    with pytest.raises(Diverged, match="not finite after update 1"):
        run.save()
    assert same(weights(tmp_path), good)


def test_a_full_disk_does_not_hide_why_a_run_diverged(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = Run(parse(arguments(reach_path, tmp_path, "--updates", "9", "--algo", "iql")))
    run.dataset.reward[:] = float("nan")
    monkeypatch.setattr("training.loop.write_atomically", full)
    with pytest.raises(Diverged, match=r"losses/critic.* not finite .*could not be written: .*No space left"):
        run.step()


def test_checkpoints_hold_no_caches_and_older_ones_that_do_are_read(reach_path: Path, tmp_path: Path) -> None:
    args = arguments(reach_path, tmp_path, "--updates", "9", "--algo", "iql")
    begun(args)
    assert not [name for name in weights(tmp_path) if name.endswith((".filter", ".expanded_bias"))]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    convolutions = [name.removesuffix("weights") for name in state["learner"]["agent"] if name.endswith(".weights")]
    state["learner"]["agent"] |= {f"{name}filter": torch.zeros(3) for name in convolutions}
    torch.save(state, tmp_path / "checkpoint.pt")
    again = Run(parse(args))
    again.restore()
    assert again.updates == 1


@pytest.mark.usefixtures("without_export")
def test_resuming_clears_up_after_a_process_that_was_killed_while_it_saved(reach_path: Path, tmp_path: Path) -> None:
    args = arguments(reach_path, tmp_path / "run", "--updates", "2")
    begun(args)
    (tmp_path / "run" / "evaluations").mkdir()
    for name in (".checkpoint.pt.x7_aY9k2", "evaluations/.update-0000001.pt.x7_aY9k2"):
        (tmp_path / "run" / name).write_bytes(b"half of it")
    train(parse([*args, "--resume"]))
    assert not list((tmp_path / "run").rglob(".*"))


def test_processes_that_resume_from_different_checkpoints_refuse(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines without a folder in common: they would average gradients of different networks."""
    args = arguments(reach_path, tmp_path / "run", "--updates", "9")
    run = Run(parse(args))
    run.restore()
    monkeypatch.setattr(Processes, "from_leader", lambda *_: 5.0)
    with pytest.raises(Rejected, match="share --output between the machines"):
        run.restore()


def test_frames_in_which_networks_see_nothing_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def far(index: int, episode: dict[str, Any]) -> None:
        episode["depth"] = [np.maximum(frame, 0.45) if index == 0 else frame for frame in episode["depth"]]

    describe(Run(parse(arguments(write_dataset(tmp_path / "data", edit=far), tmp_path / "run", "--updates", "1"))))
    assert "in 5 of 60 frames all is 0.4 m or more below the camera plane" in capsys.readouterr().err


def test_values_without_any_reward_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data", reward=lambda episode: 0.0)
    for algo, warned in (("iql", True), ("cql", True), ("bc", False)):
        flags = ("--updates", "1", "--algo", algo, "--failures", "keep")
        describe(Run(parse(arguments(data, tmp_path / "run", *flags))))
        assert ("no transition has a reward" in capsys.readouterr().err) is warned


@pytest.mark.parametrize("damage", [b"PK half of it", b"a graph", b"", bytes(100), b"\x80\x02}q\x00."])
def test_damage_of_whatever_kind_is_a_clear_error(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(damage)
    with pytest.raises(Rejected, match=r"checkpoint\.pt: expected a whole one, .*; take another"):
        saved(tmp_path / "checkpoint.pt", "a whole one", "take another", torch.device("cpu"))


def test_a_damaged_checkpoint_is_not_resumed(reach_path: Path, tmp_path: Path) -> None:
    begun(arguments(reach_path, tmp_path / "run", "--updates", "3"))
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"a graph")
    with pytest.raises(Rejected, match=r"checkpoint\.pt: expected a checkpoint of training\.run"):
        train(parse(["--resume", "--output", str(tmp_path / "run"), "--updates", "6"]))


@pytest.mark.usefixtures("without_export")
def test_killed_while_it_trained_a_run_goes_on_to_where_it_would_have_been(reach_path: Path, tmp_path: Path) -> None:
    options = ("--updates", "60", "--algo", "cql", "--threads", "1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    to_its_end(Run(parse(arguments(reach_path, whole, *options))))
    process = subprocess.Popen(
        [sys.executable, "-m", "training.run", *arguments(reach_path, killed, *options), "--checkpoint-s", "0.01"],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < torch.load(killed / "checkpoint.pt", weights_only=True)["updates"] < 60
    train(parse(["--resume", "--output", str(killed), "--checkpoint-s", "30"]))
    assert same(weights(killed), weights(whole))


@pytest.mark.parametrize("algo", ["bc", "iql", "cql"])
def test_the_probe_reports_what_the_algorithm_has(algo: str, reach_path: Path, tmp_path: Path) -> None:
    run = Run(parse(arguments(reach_path, tmp_path, "--updates", "9", "--algo", algo)))
    seen = Probe(run.dataset, seed=0).look(run.learner.agent)
    assert {"policy/entropy", "policy/log_prob", "policy/equivariance_error"} <= set(seen)
    assert seen["policy/equivariance_error"] < 1e-4
    assert ("values/q_on_turned_data" in seen) == (algo != "bc")


@pytest.mark.parametrize("algo", ["iql", "cql"])
def test_the_probe_s_values_are_the_critic_s(algo: str, reach_path: Path, tmp_path: Path) -> None:
    run = Run(parse(arguments(reach_path, tmp_path, "--updates", "9", "--algo", algo)))
    agent: Any = run.learner.agent
    set_apart(agent.target_critic)
    probe = Probe(run.dataset, seed=0)
    seen, state, action = probe.look(agent), probe.batch.state, probe.batch.action
    turned = [torch.from_numpy(turn.action(action.numpy(), run.dataset.spec.action)) for turn in QUARTER_TURNS]
    with torch.no_grad():
        on_data, *on_turned = (agent.critic(state, taken).mean().item() for taken in (action, *turned))
    assert seen["values/q_on_data"] == pytest.approx(on_data, rel=1e-4, abs=1e-6)
    assert seen["values/q_on_turned_data"] == pytest.approx(np.mean(on_turned), rel=1e-4, abs=1e-6)


def test_looking_at_the_probe_does_not_change_what_is_learned(reach_path: Path, tmp_path: Path) -> None:
    runs = [
        Run(parse(arguments(reach_path, tmp_path / name, "--updates", "9", "--algo", "cql"))) for name in ("a", "b")
    ]
    probe = Probe(runs[0].dataset, seed=0)
    for _ in range(3):
        runs[0].step()
        probe.look(runs[0].learner.agent)
        runs[1].step()
    a, b = (dict(run.learner.agent.named_parameters()) for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_plain_network_s_equivariance_error_shows(reach_path: Path, tmp_path: Path) -> None:
    run = Run(parse(arguments(reach_path, tmp_path, "--updates", "9", "--equivariance", "none")))
    assert Probe(run.dataset, seed=0).look(run.learner.agent)["policy/equivariance_error"] > 1e-3


def test_the_discount_and_n_steps_reach_the_data(reach_path: Path, tmp_path: Path) -> None:
    flags = ("--discount", "0.5", "--n-step", "2", "--algo", "iql", "--updates", "1")
    run = Run(parse(arguments(reach_path, tmp_path, *flags)))
    expected = load(reach_path, successful_only=False, discount=0.5, n_step=2)
    np.testing.assert_array_equal(run.dataset.reward, expected.reward)
    np.testing.assert_array_equal(run.dataset.discount, expected.discount)


def test_data_without_a_simulator_cannot_be_evaluated_on(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data")
    with pytest.raises(Rejected, match="--eval-every: expected data of a simulator"):
        train(parse(arguments(path, tmp_path / "run", "--updates", "4", "--eval-every", "2")))
    assert not (tmp_path / "run").exists()
