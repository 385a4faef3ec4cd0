"""The stand-in robot's loop through a server that is busy at times."""

import itertools
from collections.abc import Callable, Iterator

import gymnasium as gym
import pytest

from protos.errors import Rejected, Status
from protos.spaces import SPEC
from serving.client import PolicyClient, PolicyError
from serving.config import Config
from serving.server import Server
from sim_client import ENV_IDS
from sim_client.evaluate import Robot
from tests.makers import tiny_policy_file


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(Config(listen="localhost:0", policy=(str(tiny_policy_file(tmp_path / "tiny.onnx", SPEC)),)))
    server.load()
    yield server
    server.stop()


@pytest.fixture
def scene() -> Iterator[gym.Env]:
    env = gym.make(ENV_IDS["drawer_opening"], max_episode_steps=8)
    yield env
    env.close()


def busy(server: Server, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """From now on, the server has no room for the calls whose number `when` names."""
    admit, numbers = server.dispatcher.admit, itertools.count()

    def admit_or_refuse(name: str) -> None:
        if when(next(numbers)):
            raise Rejected("server", "at most 1 waiting calls", "2", "send less often", Status.RESOURCE_EXHAUSTED)
        admit(name)

    monkeypatch.setattr(server.dispatcher, "admit", admit_or_refuse)


def test_a_robot_asks_a_busy_server_again_and_misses_no_step(server, scene, monkeypatch) -> None:
    with PolicyClient(server.address) as client:
        calm = Robot(client, patience_s=5.0)
        expected = calm.run(scene, seed=3)
        busy(server, monkeypatch, when=lambda number: number % 3 < 2)
        robot = Robot(client, patience_s=5.0)
        episode = robot.run(scene, seed=3)
    assert calm.refusals == 0
    assert robot.refusals == 2 * len(episode)
    assert len(robot.latency_ms) == len(episode) == len(expected)
    assert (episode.action == expected.action).all()


def test_a_robot_gives_up_on_a_server_that_never_has_room(server, scene, monkeypatch) -> None:
    busy(server, monkeypatch, when=lambda number: number >= 4)
    with PolicyClient(server.address) as client, pytest.raises(PolicyError) as refused:
        Robot(client, patience_s=0.1).run(scene, seed=3)
    assert refused.value.busy
