"""The stand-in robot's loop through a server that is busy at times, or a machine that is."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import gymnasium as gym
import pytest

from protos.errors import Rejected, Status
from protos.spaces import SPEC
from serving.client import PolicyClient, PolicyError
from serving.policy import load
from serving.proofs import prove
from serving.server import Server
from sim_client import ENV_IDS
from sim_client.evaluate import Evaluate, Robot, evaluate, main
from tests.makers import settings, tiny_policy_file


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(settings(tiny_policy_file(tmp_path / "tiny.onnx", SPEC)))
    server.load()
    yield server
    server.stop()


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


def test_a_robot_waits_for_a_server_that_has_no_room_for_its_episode_yet(tmp_path, scene) -> None:
    with Server(settings(tiny_policy_file(tmp_path / "tiny.onnx", SPEC), max_episodes=1)) as full:
        full.load()
        with PolicyClient(full.address) as client, PolicyClient(full.address) as other, contextlib.ExitStack() as stack:
            stack.enter_context(other.episode())
            threading.Timer(0.3, stack.pop_all().close).start()
            robot = Robot(client, patience_s=5.0)
            assert len(robot.run(scene, seed=3)) > 0
            assert robot.refusals > 0


def test_a_report_speaks_of_the_version_that_acted_whatever_is_loaded_meanwhile(server, tmp_path, monkeypatch) -> None:
    (elsewhere := tmp_path / "another").mkdir()  # a policy goes by its file's name
    another = prove(load(tiny_policy_file(elsewhere / "tiny.onnx", SPEC, weight=2.0), intra_op_threads=1))
    started, run, act = server.registry.resolve("", "").version, Robot.run, PolicyClient._act
    acted = []

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
    report = evaluate(Evaluate(server=server.address, episodes=2))
    assert server.registry.resolve("", "").version == another.version != started
    assert set(acted) == {started} == {report["policy_version"]}


def test_a_report_that_cannot_be_written_costs_no_result(server, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "report.json").mkdir()
    flags = ["--server", server.address, "--episodes", "1", "--report", str(tmp_path / "report.json")]
    monkeypatch.setattr("sys.argv", ["evaluate", *flags])
    assert main() == 2
    said = capsys.readouterr()
    assert "0 of 1 episodes" in said.out
    assert "--report" in said.err


def test_a_robot_gives_up_on_a_server_that_never_has_room(server, scene, monkeypatch) -> None:
    busy(server, monkeypatch, when=lambda number: number >= 4)
    with PolicyClient(server.address) as client, pytest.raises(PolicyError) as refused:
        Robot(client, patience_s=0.1).run(scene, seed=3)
    assert refused.value.busy
