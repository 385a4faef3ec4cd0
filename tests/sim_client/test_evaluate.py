"""The stand-in robot's loop through a server that is busy at times, or a machine that is."""

import contextlib
import itertools
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status
from protos.spaces import SPEC
from serving.client import PolicyClient, PolicyError
from serving.connection import Connection
from serving.flight import files_of, read
from serving.policy import load
from serving.proofs import prove
from serving.security import new_token
from serving.server import Server
from sim_client import ENV_IDS
from sim_client.episodes import Episode
from sim_client.evaluate import Evaluate, Robot, evaluate, main
from sim_client.rollout import Act, rollout
from sim_client.seeds import CALIBRATED, EVALUATED, RECORDED_PER_SEED, SURVEYED, WATCHED
from tests.makers import certify, settings, tiny_policy_file

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_policy_file(tmp_path_factory.mktemp("policies") / "tiny.onnx", SPEC)


@pytest.fixture(scope="module")
def server(tiny) -> Iterator[Server]:
    """Shared by tests that leave it as it was."""
    with Server(settings(tiny)) as server:
        server.load()
        yield server


@pytest.fixture
def scene() -> Iterator[gym.Env]:
    env = gym.make(ENV_IDS["drawer_opening"], max_episode_steps=8)
    yield env
    env.close()


def busy(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    when: Callable[[int], bool],
    status: Status = Status.RESOURCE_EXHAUSTED,
) -> None:
    """From now on, the server refuses the calls whose number `when` names."""
    admit, numbers = server.dispatcher.admit, itertools.count()

    def admit_or_refuse(name: str, **how: bool) -> None:
        if when(next(numbers)):
            raise Rejected("server", "at most 1 waiting calls", "2", "send less often", status)
        admit(name, **how)

    monkeypatch.setattr(server.dispatcher, "admit", admit_or_refuse)


@pytest.mark.parametrize("status", [Status.RESOURCE_EXHAUSTED, Status.OUT_OF_RANGE], ids=lambda s: s.name)
def test_a_robot_whose_frame_came_to_nothing_asks_again_and_misses_no_step(server, scene, monkeypatch, status) -> None:
    with PolicyClient(server.address) as client:
        calm = Robot(client, patience_s=5.0)
        expected = calm.run(scene, seed=3)
        busy(server, monkeypatch, when=lambda number: number % 3 < 2, status=status)
        robot = Robot(client, patience_s=5.0)
        episode = robot.run(scene, seed=3)
    assert calm.refusals == 0
    assert robot.refusals == 2 * len(episode)
    assert len(robot.latency_ms) == len(episode) == len(expected)
    assert (episode.action == expected.action).all()


def test_a_server_that_is_slow_once_does_not_end_an_evaluation(tmp_path, scene) -> None:
    """Its answer could not have been of use any more, so nobody waits for it; the next frame's is taken."""
    valid_s, slow = 2.0, []
    with Server(settings(tiny_policy_file(tmp_path / "tiny.onnx", SPEC), valid_for_ms=1e3 * valid_s)) as server:
        server.load()
        act = server.dispatcher.act

        def stalls(*call):
            if len(slow) < 3:
                slow.append(len(slow) == 2)
                time.sleep(2 * valid_s * slow[-1])
            return act(*call)

        server.dispatcher.act = stalls
        with PolicyClient(server.address, timeout_s=60.0) as client:
            robot = Robot(client, patience_s=60.0)
            assert len(robot.run(scene, seed=3)) == len(robot.latency_ms)
    assert robot.refusals > 0
    assert max(robot.latency_ms) < 1e3 * valid_s


def test_a_robot_waits_for_a_server_that_has_no_room_for_its_episode_yet(tmp_path, scene) -> None:
    with Server(settings(tiny_policy_file(tmp_path / "tiny.onnx", SPEC), max_episodes=1)) as full:
        full.load()
        with PolicyClient(full.address) as client, PolicyClient(full.address) as other, contextlib.ExitStack() as stack:
            stack.enter_context(other.episode())
            robot, leave = Robot(client, patience_s=60.0), stack.pop_all().close

            def leave_once_one_was_refused() -> None:
                deadline = time.monotonic() + 60
                while not robot.refusals and time.monotonic() < deadline:
                    time.sleep(0.01)
                leave()

            with ThreadPoolExecutor(1) as pool:
                leaving = pool.submit(leave_once_one_was_refused)
                assert len(robot.run(scene, seed=3)) > 0
                leaving.result()
            assert robot.refusals


@pytest.fixture
def played(monkeypatch) -> list[int]:
    """Seeds of the short episodes that evaluations play from now on; every other one counts as a success."""
    seeds: list[int] = []

    def play(env: gym.Env, act: Act, seed: int) -> Episode:
        seeds.append(seed)
        episode = rollout(TimeLimit(env, 3), act, seed)
        return replace(episode, reward=np.full(len(episode), len(seeds) % 2, np.float32))

    monkeypatch.setattr("sim_client.evaluate.rollout", play)
    return seeds


def test_a_report_speaks_of_the_version_that_acted_whatever_is_loaded_meanwhile(
    tiny, tmp_path, played, monkeypatch
) -> None:
    another = prove(load(tiny_policy_file(tmp_path / "tiny.onnx", SPEC, weight=2.0), intra_op_threads=1))
    run, act, acted = Robot.run, PolicyClient._act, []
    with Server(settings(tiny)) as server:
        server.load()
        started = server.registry.resolve("", "").version

        def run_and_load_another(robot, env, seed):
            episode = run(robot, env, seed)
            server.registry.add(another)
            return episode

        def noted(*args, **kwargs):
            answer = act(*args, **kwargs)
            acted.append(answer.version)
            return answer

        monkeypatch.setattr(Robot, "run", run_and_load_another)
        monkeypatch.setattr(PolicyClient, "_act", noted)
        report = evaluate(Evaluate(connection=Connection(server.address), episodes=2))
        assert server.registry.resolve("", "").version == another.version != started
    assert set(acted) == {started} == {report["policy_version"]}


def test_scenes_of_evaluation_are_nobody_elses(server, played) -> None:
    """Neither those of data, nor of the noise in them, nor those by which a training chooses what it keeps."""
    for seed in (0, 1):
        evaluate(Evaluate(connection=Connection(server.address), episodes=3, seed=seed))
    assert len(set(played)) == 6
    assert RECORDED_PER_SEED < SURVEYED < CALIBRATED < WATCHED < EVALUATED <= min(played)


def test_a_report_and_the_servers_recording_say_how_each_episode_went(tmp_path, played) -> None:
    wild = tiny_policy_file(tmp_path / "wild.onnx", SPEC, breaks=["wild"], golden_from="broken")
    with Server(settings(wild, record=tmp_path / "flight")) as recording:
        recording.load()
        report = evaluate(Evaluate(connection=Connection(recording.address), episodes=3))
    assert (report["successes"], report["failed_seeds"]) == (2, [played[1]])
    assert report["interventions"] > 0
    messages = [entry.message for file in files_of(tmp_path / "flight") for entry in read(file)]
    success, failure = pb.EndEpisodeRequest.OUTCOME_SUCCESS, pb.EndEpisodeRequest.OUTCOME_FAILURE
    assert [m.request.outcome for m in messages if isinstance(m, pb.FlightEnd)] == [success, failure, success]


def test_holds_are_counted(tmp_path, scene) -> None:
    class Holding:
        """A client whose every answer is to stay."""

        @contextlib.contextmanager
        def episode(self):
            stay = SimpleNamespace(action=SPEC.hold(0.0), latency_ms=1.0, interventions=(), hold=True)
            yield SimpleNamespace(act=lambda *_: stay, succeeded=lambda _: None)

    robot = Robot(Holding(), patience_s=1.0)  # type: ignore[arg-type]
    assert robot.holds == 0 < len(robot.run(scene, seed=3)) == robot.holds


HEARING = [sys.executable, "-c", (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)]  # fmt: skip
"""Begins a command that hears SIGINT: what a shell runs in the background ignores it, and hands that down. Not by
preexec_fn, which a fork beside gRPC's threads may never leave."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_evaluation_says_what_was_done_and_ends_its_episode(tmp_path, number) -> None:
    with Server(settings(tiny_policy_file(tmp_path / "tiny.onnx", SPEC), record=tmp_path / "flight")) as recording:
        recording.load()
        command = [sys.executable, "-m", "sim_client.evaluate", "--server", recording.address, "--episodes", "1000"]
        process = subprocess.Popen([*HEARING, *command], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while sum(recording.metrics.call_counts().values()) < 60:  # the second episode
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"after [1-9]\d* of 1000 episodes, of which 0 succeeded", said)
    assert "Traceback" not in said
    messages = [entry.message for file in files_of(tmp_path / "flight") for entry in read(file)]
    outcomes = [m.request.outcome for m in messages if isinstance(m, pb.FlightEnd)]
    assert outcomes[-1] == pb.EndEpisodeRequest.OUTCOME_ABORTED


def test_it_is_let_in_by_a_token_over_tls(tmp_path, played, capsys) -> None:
    certify(tmp_path, localhost="localhost", robot="robot@factory")
    secret = new_token("robot", ("act",), tmp_path / "tokens")
    guarded = settings(
        tiny_policy_file(tmp_path / "tiny.onnx", SPEC),
        tokens=tmp_path / "tokens",
        tls_cert=tmp_path / "localhost.pem",
        tls_key=tmp_path / "localhost.key",
        tls_client_ca=tmp_path / "ca.pem",
    )
    with Server(guarded) as closed:
        closed.load()
        connection = Connection(
            closed.address,
            token=secret,
            tls_ca=tmp_path / "ca.pem",
            tls_cert=tmp_path / "robot.pem",
            tls_key=tmp_path / "robot.key",
        )
        report = evaluate(Evaluate(connection, episodes=1))
        assert report["episodes"] == 1
        assert secret not in str(report)
        with pytest.raises(PolicyError, match="UNAUTHENTICATED"):
            evaluate(Evaluate(replace(connection, token=""), episodes=1))


def test_another_task_than_the_policys_is_pointed_out(server, played, capsys) -> None:
    report = evaluate(Evaluate(connection=Connection(server.address), episodes=1))
    assert (report["task"], report["policy_task"]) == ("drawer_opening", "tiny")
    said = capsys.readouterr().err
    assert said.startswith(f"waiting for {server.address}, 30 s at most\n")
    assert "policy tiny was trained for tiny, the task here is drawer_opening" in said


def test_a_token_is_not_shown_with_what_was_asked() -> None:
    assert "a secret" not in repr(Evaluate(Connection(token="a secret")))


def test_half_a_certificate_is_refused() -> None:
    with pytest.raises(ValueError, match="--tls-cert and --tls-key go together"):
        Connection(tls_cert=Path("robot.pem"))


def test_a_token_file_that_holds_none_is_refused_by_its_flag(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for file, words in (("empty", "is empty"), ("nothing", "No such file"), (".", "Is a directory")):
        with pytest.raises(ValueError, match=f"--token-file .*{words}"):
            Connection(token_file=tmp_path / file)
    with pytest.raises(ValueError, match="either --token or --token-file"):
        Connection(token="a secret", token_file=tmp_path / "empty")


@pytest.mark.parametrize(
    "flags", [("--token-file", "/nowhere/token"), ("--tls-cert", "robot.pem"), ("--server", "localhost")]
)
def test_a_connection_that_cannot_be_is_one_line(flags, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", *flags])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith(flags[0])
    assert said.count("\n") == 1


def test_a_server_that_is_ready_need_not_be_waited_for(server, played) -> None:
    assert evaluate(Evaluate(Connection(server.address), episodes=1, wait_s=0))["episodes"] == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"timeout_s": math.inf},
        {"timeout_s": math.nan},
        {"timeout_s": 0.0},
        {"wait_s": -1.0},
        {"wait_s": math.inf},
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(asked) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(asked)).replace('_', '-')}"):
        Evaluate(**asked)


@pytest.mark.parametrize("report", ["folder", "file/report.json", "/proc/nowhere/report.json"])
def test_a_report_that_cannot_be_written_is_told_before_any_episode(report, tmp_path, played, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["evaluate", "--report", str(tmp_path / report)])
    assert main() == 2
    assert capsys.readouterr().err.startswith(f"--report {tmp_path / report}: ")
    assert not played


def test_a_report_that_cannot_be_written_any_more_costs_no_result(
    server, tmp_path, played, monkeypatch, capsys
) -> None:
    def evaluate_and_be_in_the_way(config: Evaluate) -> dict:
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "report.json").mkdir()
        return evaluate(config)

    monkeypatch.setattr("sim_client.evaluate.evaluate", evaluate_and_be_in_the_way)
    flags = ["--server", server.address, "--episodes", "1", "--report", str(tmp_path / "report.json")]
    monkeypatch.setattr("sys.argv", ["evaluate", *flags])
    assert main() == 2
    said = capsys.readouterr()
    assert "1 of 1 episodes" in said.out
    assert "--report" in said.err


def test_a_certificate_that_is_not_there_is_no_failed_policy(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "--tls-ca", str(tmp_path / "no.pem"), "--min-success", "0.9"])
    assert main() == 2
    assert "no.pem" in capsys.readouterr().err


def test_a_robot_gives_up_on_a_server_that_never_has_room(server, scene, monkeypatch) -> None:
    busy(server, monkeypatch, when=lambda number: number >= 4)
    with PolicyClient(server.address) as client, pytest.raises(PolicyError) as refused:
        Robot(client, patience_s=0.1).run(scene, seed=3)
    assert refused.value.busy
