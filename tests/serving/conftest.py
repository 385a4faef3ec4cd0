"""A healthy policy, a server in this process that serves it, and servers in processes of their own."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving.policy import Policy, load
from serving.proofs import prove
from serving.server import Server
from tests.makers import settings, tiny_policy_file

REPOSITORY = Path(__file__).resolve().parents[2]


class CountingSession:
    """An onnxruntime session that says how often the model was asked."""

    def __init__(self, session: Any) -> None:
        self._session, self.runs = session, 0

    def run(self, *args: Any) -> Any:
        self.runs += 1
        return self._session.run(*args)

    def get_outputs(self) -> Any:
        return self._session.get_outputs()


@dataclass(frozen=True)
class Running:
    """A server in this process, a stub that talks to it over a real socket, and its policies' sessions by name."""

    server: Server
    stub: pb_grpc.PolicyServiceStub
    channel: grpc.Channel
    sessions: dict[str, CountingSession]

    @property
    def policy(self) -> Policy:
        return self.server.registry.resolve("", "")

    @property
    def runs(self) -> int:
        return sum(session.runs for session in self.sessions.values())


@pytest.fixture(scope="session", autouse=True)
def no_lame_duck() -> Iterator[None]:
    """A server in this process does not wait, when it is stopped, until its callers are elsewhere: there are none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.server.LAME_DUCK_S", 0.0)
        yield


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy_file(tmp_path_factory.mktemp("policies") / "policy.onnx")


@pytest.fixture(scope="session")
def policy(healthy: Path) -> Policy:
    return prove(load(healthy))


def start(**config: Any) -> Running:
    server = Server(settings(**config))
    server.load()
    counted = [replace(p, session=CountingSession(p.session)) for p in server.registry]
    server.registry.publish(counted)
    channel = grpc.insecure_channel(server.address)
    return Running(server, pb_grpc.PolicyServiceStub(channel), channel, {p.name: p.session for p in counted})


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """serve(policy=(...), ...) -> Running; stopped after the test."""
    started: list[Running] = []

    def make(**config: Any) -> Running:
        started.append(start(**config))
        return started[-1]

    yield make
    for running in started:
        running.channel.close()
        running.server.stop()


@pytest.fixture(scope="module")
def running(healthy: Path) -> Iterator[Running]:
    """One server with the healthy policy, shared by a module's tests."""
    running = start(policy=(f"tiny={healthy}",))
    yield running
    running.channel.close()
    running.server.stop()


@pytest.fixture
def launch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """launch("--policy", ...) -> a server process; ended after the test."""
    processes: list[subprocess.Popen[str]] = []

    def make(*arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "serving.server", *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield make
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def address_of(process: subprocess.Popen[str]) -> str:
    """Wait for the line that says where it serves."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving on "), process.stderr.read() if process.stderr else line
    return line.split()[-1]
