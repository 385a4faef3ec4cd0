"""The stand-in robot's loop through a server that is busy at times, or a machine that is."""

import itertools
from collections.abc import Callable, Iterator

import gymnasium as gym
import pytest

from protos.errors import Rejected, Status
from protos.spaces import SPEC
from serving.client import PolicyClient, PolicyError
from serving.server import Server
from sim_client import ENV_IDS
from sim_client.evaluate import Robot
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


def test_a_robot_gives_up_on_a_server_that_never_has_room(server, scene, monkeypatch) -> None:
    busy(server, monkeypatch, when=lambda number: number >= 4)
    with PolicyClient(server.address) as client, pytest.raises(PolicyError) as refused:
        Robot(client, patience_s=0.1).run(scene, seed=3)
    assert refused.value.busy
