"""The whole path in small, each step by its own command: collect, train, export, serve, close the loop."""

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import minari
import pytest

from protos.spaces import SPEC
from serving.client import PolicyClient
from serving.server import Server
from sim_client import evaluate
from tests.makers import settings, tiny_policy_file
from training.demo import main, server


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `make demo` leaves and says, from 4 recorded episodes and seconds of training: real, if not good."""
    home = tmp_path_factory.mktemp("demo")
    small = ("--episodes", "4", "--minutes", "0.1", "--eval-episodes", "2", "--seed", "3")
    command = [sys.executable, "-m", "training.demo", "--output", str(home), *small, "--setup-seconds", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return home, done.stdout


@pytest.fixture(scope="module")
def home(demo: tuple[Path, str]) -> Path:
    return demo[0]


@pytest.fixture(scope="module")
def policy(home: Path) -> Path:
    return home / "policy.onnx"


@pytest.fixture(scope="module")
def address(policy: Path) -> Iterator[str]:
    with server(policy) as address:
        yield address


Evaluated = Callable[..., tuple[int, str]]


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluated:
    """evaluated("--server", ...) -> how the command exits, in this process, and what it complains of."""

    def run(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["evaluate", *flags])
        return evaluate.main(), capsys.readouterr().err

    return run


@pytest.mark.parametrize(("failure", "code"), [(KeyboardInterrupt(), 130), (OSError("no space left"), 1)], ids=repr)
def test_a_demo_that_is_stopped_says_so(failure, code, monkeypatch, capsys) -> None:
    def stopped(config):
        raise failure

    monkeypatch.setattr("training.demo.demonstrate", stopped)
    monkeypatch.setattr("sys.argv", ["demo"])
    assert main() == code
    assert ("interrupted" if code == 130 else "the demo stopped: no space left") in capsys.readouterr().err


def test_the_demo_leaves_a_complete_report(home: Path, policy: Path) -> None:
    report = json.loads((home / "report.json").read_text())
    assert {"success_rate", "successes", "episodes", "wilson_low", "wilson_high", "latency_ms"} <= report.keys()
    assert report["episodes"] == 2
    assert report["policy_sha256"] == hashlib.sha256(policy.read_bytes()).hexdigest()
    assert report["seconds"].keys() == {"setup", "collect", "train", "serve", "evaluate", "total"}
    assert report["seconds"]["setup"] == 7
    assert all(seconds > 0 for seconds in report["seconds"].values())


def test_the_policy_says_where_it_comes_from_and_what_it_proved(policy: Path, address: str) -> None:
    with PolicyClient(address, spec=SPEC) as client:
        info = client.policy()
    data = minari.MinariDataset(policy.parent / "data" / "data")
    assert (info.task, info.algorithm, info.equivariance, info.seed) == ("drawer_opening", "bc", "both", 3)
    assert info.dataset_id == data.storage.metadata["dataset_id"]
    assert len(info.dataset_sha256) == 64
    assert {proof.name for proof in info.proofs} == {"golden", "symmetry", "gripper"}
    assert info.equivariance_error_90 <= 1e-4


def test_the_robot_closes_the_loop_and_reports(demo: tuple[Path, str]) -> None:
    home, said = demo
    report = json.loads((home / "report.json").read_text())
    assert report["control_steps"] == sum(report["lengths"])
    assert 0 <= report["wilson_low"] <= report["success_rate"] <= report["wilson_high"] <= 1
    assert 0 < report["latency_ms"]["p50"] <= report["latency_ms"]["p95"] <= report["latency_ms"]["p99"]
    assert f"{report['successes']} of 2 episodes succeeded" in said


def test_a_policy_is_tried_on_another_task_robot_and_world(address: str, tmp_path: Path, evaluated: Evaluated) -> None:
    path = tmp_path / "report.json"
    world = ("--task", "block_in_bowl", "--arm", "kuka", "--randomize.depth-noise-m", "0.002")
    code, said = evaluated("--server", address, *world, "--episodes", "1", "--report", str(path))
    assert code == 0, said
    report = json.loads(path.read_text())
    assert (report["task"], report["world"]["arm"]) == ("block_in_bowl", "kuka")
    assert report["world"]["randomize"]["depth_noise_m"] == 0.002


def test_a_robot_with_another_camera_is_refused(address: str, evaluated: Evaluated) -> None:
    code, said = evaluated("--server", address, "--view", "side", "--episodes", "1")
    assert code == 2, said
    assert "contract.observation" in said


def test_min_success_decides_the_exit_code(tmp_path: Path, evaluated: Evaluated) -> None:
    with Server(settings(tiny_policy_file(tmp_path / "clueless.onnx", SPEC))) as clueless:
        clueless.load()
        evaluation = ("--server", clueless.address, "--episodes", "1", "--seed", "1")
        code, said = evaluated(*evaluation, "--min-success", "0.0")
        assert code == 0, said
        code, said = evaluated(*evaluation, "--min-success", "0.5")
    assert code == 1, said
    assert "below --min-success" in said


def test_no_server_is_an_error_that_says_so(evaluated: Evaluated) -> None:
    code, said = evaluated("--server", "localhost:1", "--episodes", "1", "--wait-s", "0.5")
    assert code == 2, said
    assert "UNAVAILABLE" in said


def test_a_server_of_another_contract_is_refused_by_the_robot(tmp_path: Path, evaluated: Evaluated) -> None:
    with Server(settings(tiny_policy_file(tmp_path / "small.onnx"))) as other:  # a 32 x 32 view
        other.load()
        code, said = evaluated("--server", other.address, "--episodes", "1")
    assert code == 2, said
    assert "contract.observation.height" in said


def test_a_server_lost_in_the_middle_ends_the_evaluation_with_a_reason(tmp_path: Path) -> None:
    clueless = tiny_policy_file(tmp_path / "clueless.onnx", SPEC)
    command = [sys.executable, "-m", "serving.server", "--policy", str(clueless), "--listen", "localhost:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("serving on ").strip()
        robot = subprocess.Popen(
            [sys.executable, "-u", "-m", "sim_client.evaluate", "--server", address, "--episodes", "1000"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert robot.stderr is not None
        while "1/1000" not in (line := robot.stderr.readline()):  # tqdm's \r: text mode reads a newline
            assert line, "the robot stopped by itself"
        process.send_signal(signal.SIGKILL)
        _, said = robot.communicate(timeout=30)
    assert robot.returncode == 2
    assert re.search(r"evaluation stopped after [1-9]\d* of 1000 episodes, of which \d+ succeeded: UNAVAILABLE", said)
    assert "Traceback" not in said
