"""Start and stop: nothing is served before it is proved, nothing is cut off that is under way."""

import contextlib
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.codec import pack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving.client import PolicyClient
from serving.config import parse
from serving.errors import StartupError
from serving.flight import files_of, read
from serving.listening import MAX_CONCURRENT_CALLS
from serving.security import new_token
from serving.server import LAME_DUCK_S, SERVICES, THREADS, Server
from tests.makers import far_scene, scene, settings, tiny_policy_file
from tests.serving.conftest import REPOSITORY, address_of
from tests.serving.load import free_port
from tests.serving.requests import acting
from tests.serving.test_dispatcher import until

Health = health_pb2.HealthCheckResponse


def status_of(address, service=""):
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


def act(address, observation, timeout=10):
    with grpc.insecure_channel(address) as channel:
        request = pb.GetActionRequest(observation=pack_observation(observation))
        return pb_grpc.PolicyServiceStub(channel).GetAction(request, timeout=timeout)


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health_says_serving_only_after_the_proofs(healthy, service):
    with Server(settings(healthy)) as server:
        assert status_of(server.address, service) == Health.NOT_SERVING
        with pytest.raises(grpc.RpcError) as refused:
            act(server.address, scene(0))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        server.load()
        assert status_of(server.address, service) == Health.SERVING
        act(server.address, scene(0))


def test_a_drain_hears_how_episodes_went(serve, healthy, tmp_path, monkeypatch):
    """A robot at 20 Hz that is told UNAVAILABLE gives up, and its recording has an end."""
    monkeypatch.setattr("serving.server.LAME_DUCK_S", LAME_DUCK_S)
    running = serve(policy=(str(healthy),), record=tmp_path / "flight")
    moving = threading.Event()

    def fly():
        with PolicyClient(running.server.address) as client, client.episode() as episode:
            while True:
                episode.act(scene(0))
                moving.set()
                time.sleep(0.05)

    with ThreadPoolExecutor(1) as robot:
        flight = robot.submit(fly)
        assert moving.wait(10)
        running.server.stop()
        assert flight.exception().code is grpc.StatusCode.UNAVAILABLE
    (file,) = files_of(tmp_path / "flight")
    *_, last = read(file)
    assert last.message.request.outcome == pb.EndEpisodeRequest.OUTCOME_ABORTED


def test_a_drain_does_not_wait_for_clients_that_only_stay_connected(launch, healthy):
    """gRPC does, as long as its grace lets it, and serving.client is slow to notice."""
    process = launch("--policy", healthy, "--listen", "localhost:0", "--grace-s", "60")
    with PolicyClient(address_of(process)) as client:
        client.act(scene(0))
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert process.wait(30) == 0
        assert time.monotonic() - begun < 2.0 + LAME_DUCK_S


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_drains(launch, tmp_path, signum):
    """The call in flight is answered, new ones are refused, watchers hear of it, and the exit is clean."""
    file = tiny_policy_file(tmp_path / "p.onnx", breaks=["slow_when_far"])
    process = launch("--policy", file, "--listen", "localhost:0", "--grace-s", "30")
    address = address_of(process)
    act(address, scene(0))
    with grpc.insecure_channel(address) as channel, grpc.insecure_channel(address) as another:
        watch = health_pb2_grpc.HealthStub(another).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == Health.SERVING
        slow = pb_grpc.PolicyServiceStub(channel).GetAction.future(
            pb.GetActionRequest(observation=pack_observation(far_scene())), timeout=20
        )
        time.sleep(0.2)
        assert not slow.done()
        process.send_signal(signum)
        assert next(watch).status == Health.NOT_SERVING
        watch.cancel()
        time.sleep(0.1)
        with pytest.raises(grpc.RpcError) as refused:
            act(address, scene(0), timeout=2)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert slow.result().policy == "tiny"
    assert process.wait(10) == 0
    _, errors = process.communicate()
    assert "Traceback" not in errors


def test_a_signal_while_policies_prove_themselves_ends_the_start(launch, healthy):
    address = f"localhost:{free_port()}"
    many = [part for i in range(200) for part in ("--policy", f"p{i}={healthy}")]
    process = launch(*many, "--listen", address)

    def listens():  # as soon as it starts to load
        with contextlib.suppress(grpc.RpcError):
            return status_of(address) == Health.NOT_SERVING
        assert process.poll() is None
        return False

    until(listens, 30)
    time.sleep(0.1)  # until it also hears signals
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    assert "serving on" not in out
    assert "stopped: 0 calls answered" in errors


def test_sighup_takes_up_policies_and_tokens(launch, tmp_path):
    folder, tokens = tmp_path / "policies", tmp_path / "tokens"
    folder.mkdir()
    tiny_policy_file(folder / "door.onnx")
    secrets = [new_token(name, ("act",), tokens) for name in ("first", "second")]
    process = launch("--policies", folder, "--tokens", tokens, "--listen", "localhost:0")

    with grpc.insecure_channel(address_of(process)) as channel:

        def seen(secret):
            try:
                metadata = (("authorization", f"Bearer {secret}"),)
                return pb_grpc.PolicyServiceStub(channel).GetAction(acting(), metadata=metadata, timeout=10).version
            except grpc.RpcError as error:
                return error.code().name

        (before,) = {seen(secret) for secret in secrets}
        tokens.write_text("".join(line for line in tokens.read_text().splitlines(True) if not line.startswith("first")))
        tiny_policy_file(folder / "door.onnx", weight=1.5)
        process.send_signal(signal.SIGHUP)
        until(lambda: seen(secrets[0]) == "UNAUTHENTICATED")
        until(lambda: re.fullmatch("[0-9a-f]{12}", seen(secrets[1])) and seen(secrets[1]) != before)


LISTENER = """
import signal, sys, threading, time
from serving.signals import STOPS, listen
stop, refresh = threading.Event(), threading.Event()
listen(dict.fromkeys(STOPS, stop) | {signal.SIGHUP: refresh})
print("listening", flush=True)
if sys.argv[1] == "elsewhere":
    given = threading.Thread(target=threading.Event().wait, daemon=True)
    given.start()
    for signum in (signal.SIGHUP, signal.SIGTERM):
        threading.Timer(0.5, lambda signum=signum: signal.pthread_kill(given.ident, signum)).start()
        (stop if signum == signal.SIGTERM else refresh).wait()
    sys.exit(7)
stop.wait()
print("stopping", flush=True)
time.sleep(60)
"""


def test_a_signal_is_heard_whichever_thread_is_given_it():
    """The main thread waits, and is not woken."""
    done = subprocess.run([sys.executable, "-c", LISTENER, "elsewhere"], cwd=REPOSITORY, timeout=20, check=False)
    assert done.returncode == 7


RELOADED_TOO_SOON = """
import os, signal, sys
from serving import server

def started(_config):
    os.kill(os.getpid(), signal.SIGHUP)
    sys.exit(7)

server.Server = started
server.serve(None)
"""


def test_a_reload_that_comes_while_the_server_starts_does_not_end_it():
    done = subprocess.run([sys.executable, "-c", RELOADED_TOO_SOON], cwd=REPOSITORY, timeout=20, check=False)
    assert done.returncode == 7


def test_watching_names_that_nobody_knows_does_not_fill_the_memory(running, monkeypatch):
    """The service remembers each, and anybody may ask."""
    monkeypatch.setattr("serving.health.MOST_UNKNOWN", 20)
    stub = health_pb2_grpc.HealthStub(running.channel)

    def first_of(name):
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=10)
        try:
            return next(watch).status
        except grpc.RpcError as error:
            return error.code()
        finally:
            watch.cancel()

    seen = [first_of(f"policy {i}") for i in range(25)]
    assert seen == 20 * [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN] + 5 * [grpc.StatusCode.NOT_FOUND]
    assert first_of("policy 3") == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert first_of("x" * 100_000) == grpc.StatusCode.NOT_FOUND
    assert first_of("tiny") == first_of("") == health_pb2.HealthCheckResponse.SERVING
    assert len(running.server.health._send_response_callbacks) <= 22


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_second_signal_does_not_wait(first, second):
    command = [sys.executable, "-c", LISTENER, "twice"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(first)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(second)
        assert process.wait(10) == -second


def finished(process):
    """(exit status, stdout, stderr) of a server that should give up by itself."""
    out, err = process.communicate(timeout=20)
    assert "Traceback" not in err
    assert "serving on" not in out
    return process.returncode, err


def test_a_refused_policy_ends_the_start_and_says_why(launch, tmp_path, healthy):
    broken = tiny_policy_file(tmp_path / "broken.onnx", breaks=["transposed"])
    code, err = finished(launch("--policy", healthy, "--policy", f"b={broken}", "--listen", "localhost:0"))
    assert code == 1
    assert "broken.onnx" in err
    assert "image mirrored or transposed?" in err
    assert "export the policy again" in err


def test_a_port_in_use_is_a_clear_error(launch, healthy):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        code, err = finished(launch("--policy", healthy, "--listen", address))
    assert code == 1
    assert f"cannot listen on {address}" in err


def test_two_servers_cannot_share_a_port(running, healthy):
    with pytest.raises(StartupError, match="is the port in use"):
        Server(settings(healthy, listen=running.server.address))


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:50051", "robot.local:50051"])
def test_an_address_that_others_reach_needs_insecure(healthy, listen):
    with pytest.raises(StartupError, match="--insecure"):
        Server(settings(healthy, listen=listen))


def test_insecure_is_a_choice(healthy):
    with Server(settings(healthy, listen="0.0.0.0:0", insecure=True)) as server:
        server.load()
        act(server.address.replace("0.0.0.0", "127.0.0.1"), scene(0))


def test_what_outlives_the_grace_holds_up_no_end(healthy, tmp_path, monkeypatch):
    """Of a policy's proofs, say: the recording has its index by then, and a process may end."""
    secret = new_token("operator", ("admin",), tmp_path / "tokens")
    server = Server(settings(healthy, grace_s=0.2, tokens=tmp_path / "tokens", record=tmp_path / "flight"))
    server.load()
    begun, over = threading.Event(), threading.Event()

    def proves(*_):
        begun.set()
        over.wait(20)

    monkeypatch.setattr(server.library, "load", proves)
    with grpc.insecure_channel(server.address) as channel:
        admin = pb_grpc.PolicyAdminStub(channel)
        token = (("authorization", f"Bearer {secret}"),)
        under_way = admin.LoadPolicy.future(pb.LoadPolicyRequest(name="x"), metadata=token)
        assert begun.wait(5)
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < 5
        assert under_way.code() is grpc.StatusCode.UNAVAILABLE
    assert not server.is_idle
    over.set()
    until(lambda: server.is_idle)


def test_proofs_of_a_file_that_changed_are_under_way_too(healthy):
    """By SIGHUP, and then SIGTERM: a process that ended meanwhile as if nothing were would be aborted."""
    with Server(settings(healthy)) as server:
        server.load()
        with server.library._loading:
            server.stop()
            assert not server.is_idle
        assert server.is_idle


def callers_threads() -> int:
    return sum(thread.name.startswith("call_") for thread in threading.enumerate())


@pytest.mark.parametrize(("queue", "threads"), [(4, THREADS), (1000, MAX_CONCURRENT_CALLS)])
def test_all_threads_are_there_before_the_first_call_and_gone_after_the_last(healthy, queue, threads):
    before = callers_threads()
    with Server(settings(healthy, queue=queue)) as server:
        assert callers_threads() - before == threads
        server.load()
        act(server.address, scene(0))
        assert callers_threads() - before == threads
    assert callers_threads() == before


@pytest.mark.parametrize("listen", ["", "localhost", "50051", ":50051", "localhost:port", "localhost:70000"])
def test_an_address_is_host_and_port(healthy, listen):
    with pytest.raises(StartupError, match="HOST:PORT"):
        Server(settings(healthy, listen=listen))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"policy": ()}, "--policy"),
        ({"concurrency": 0}, "concurrency"),
        ({"intra_op_threads": 0}, "intra_op_threads"),
        ({"valid_for_ms": -1.0}, "valid_for_ms"),
        ({"valid_for_ms": float("inf")}, "valid_for_ms"),
        ({"grace_s": float("nan")}, "grace_s"),
        ({"workspace": (0.7, 0.3, 0.0, 1.0, 0.0, 1.0)}, "workspace"),
    ],
)
def test_impossible_settings_are_refused(changed, words):
    with pytest.raises(StartupError, match=words):
        Server(settings("p.onnx", **changed))


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], {})
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    for word in ("--policy", "--listen", "localhost:50051", "--insecure", "--workspace", "--metrics-port", "golden"):
        assert word in help_text


LIGHT = """
import sys
import {module}
heavy = {forbidden} & {{name.partition(".")[0] for name in sys.modules}}
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("serving.server", {"torch", "e2cnn", "pybullet", "gymnasium", "minari", "onnx", "sim_client", "training"}),
        ("serving.client", {"torch", "onnxruntime", "onnx", "tyro", "prometheus_client"}),
    ],
)
def test_imports_stay_light(module, forbidden):
    code = LIGHT.format(module=module, forbidden=forbidden)
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_a_server_has_all_the_descriptors_that_it_may_have(launch, healthy):
    """Each connection holds one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] - 1, before[1]))  # what a server begins with
    try:
        process = launch("--policy", healthy, "--listen", "localhost:0")
        address_of(process)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (before[1], before[1])


def test_who_connects_and_says_nothing_is_hung_up_on(serve, healthy, monkeypatch):
    monkeypatch.setattr("serving.listening.HANDSHAKE_MS", 500)
    running = serve(policy=(str(healthy),))
    host, port = running.server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as silent:
        while silent.recv(4096):  # the server's own settings, and then the end
            pass
