"""Many callers, rude ones among them: what is counted is what they saw, and nothing leaks."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.equiserve.v1 import policy_pb2 as pb
from tests.serving.conftest import REPOSITORY, address_of
from tests.serving.load import DRAINED, ROOM, SOAKED, Vitals, connect, drained, rude_client
from tests.serving.requests import acting
from tests.serving.test_metrics import counted


@pytest.mark.parametrize("round_", range(3))
def test_a_drain_under_load_fails_no_call_that_was_accepted(launch, healthy, round_):
    process = launch("--policy", healthy, "--listen", "localhost:0", *ROOM)
    status, seen, answered = drained(process, address_of(process))
    assert status == 0
    assert seen["OK"] == answered > 0
    assert set(seen) <= DRAINED


def test_counts_are_exactly_what_the_callers_saw(serve, healthy):
    running = serve(policy=(str(healthy),), metrics_port=0, concurrency=1, queue=2)
    requests = [acting(1), pb.GetActionRequest(), acting(1, policy="other"), acting(2), acting(3, age_us=10**9)]
    seen, lock = Counter(), threading.Lock()

    def drive():
        for i in range(60):
            try:
                running.stub.GetAction(requests[i % len(requests)], timeout=10)
                code = "OK"
            except grpc.RpcError as error:
                code = error.code().name
            with lock:
                seen[code] += 1

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = counted(running.server.metrics_port)
    assert counts == dict(seen)
    assert set(seen) >= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE"}
    stats = running.stub.GetStats(pb.GetStatsRequest())
    assert {c.code: c.count for c in stats.calls if c.method == "GetAction"} == counts
    (call,) = (latency for latency in stats.latencies if latency.phase == "call")
    assert call.samples == counts["OK"]
    assert 0 < call.p50_ms <= call.p95_ms <= call.p99_ms <= call.max_ms


def test_stats_tell_of_the_envelope_the_line_and_episodes(serve, tmp_path):
    from tests.makers import tiny_policy_file

    wild = tiny_policy_file(tmp_path / "p.onnx", breaks=["wild"], golden_from="broken")
    running = serve(policy=(str(wild),))
    running.stub.StartEpisode(pb.StartEpisodeRequest())
    answer = running.stub.GetAction(acting(1))
    stats = running.stub.GetStats(pb.GetStatsRequest())
    assert {(r.field, r.rule): r.count for r in stats.interventions} == {
        (i.field, i.rule): 1 for i in answer.interventions
    }
    assert (stats.running, stats.waiting, stats.open_episodes) == (0, 0, 1)
    assert stats.uptime_s > 0


def test_health_is_answered_while_every_place_is_taken(serve, healthy, monkeypatch):
    places = {"concurrency": 2, "queue": 2}
    running, go = serve(policy=(str(healthy),), **places), threading.Event()
    session = running.sessions["tiny"]
    run = session.run
    monkeypatch.setattr(session, "run", lambda *args: (go.wait(20), run(*args))[1])
    clients = [connect(running.server.address) for _ in range(6)]
    from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc

    calls = [pb_grpc.PolicyServiceStub(channel).GetAction.future(acting(1)) for channel in clients]
    deadline = time.monotonic() + 5
    while sum(call.done() for call in calls) < len(calls) - 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for service in ("", "tiny", "equiserve.v1.PolicyService"):
        asked = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(running.channel).Check(asked, timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    go.set()
    assert sorted(call.exception() is None for call in calls) == [False] * 2 + [True] * 4
    for channel in clients:
        channel.close()


KILLED = """
import sys, threading
from collections import Counter
from tests.serving.load import rude_client
rude_client(sys.argv[1], 100.0, threading.Event(), 0, Counter())
"""


def test_a_short_soak_leaves_nothing_behind(launch, healthy, tmp_path):
    """Cancels, nonsense and killed clients; threads and descriptors come back to what they were."""
    process = launch("--policy", healthy, "--listen", "localhost:0", "--record", tmp_path / "flight")
    address, vitals = address_of(process), Vitals(process.pid)
    seen, over = Counter(), threading.Event()

    def soak(seconds):
        over.clear()
        threads = [threading.Thread(target=rude_client, args=(address, 50.0, over, i, seen)) for i in range(4)]
        for thread in threads:
            thread.start()
        victim = subprocess.Popen([sys.executable, "-c", KILLED, address], cwd=REPOSITORY)
        time.sleep(seconds)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        over.set()
        for thread in threads:
            thread.join()
        time.sleep(0.5)

    soak(3.0)  # warm: queues and the allocator's arenas have found their size
    threads, descriptors, rss = vitals.threads(), vitals.descriptors(), vitals.rss_mib()
    soak(6.0)
    assert vitals.threads() <= threads + 2
    assert vitals.descriptors() <= descriptors + 2
    assert vitals.rss_mib() < rss + 24
    assert seen["OK"] > 300
    assert set(seen) <= SOAKED
    process.terminate()
    assert process.wait(20) == 0
