"""Calls are counted by status and timed by phase."""

import contextlib
import re
import socket
import threading
import time
import urllib.error
import urllib.request

import grpc
import pytest

from protos.codec import pack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from serving.errors import StartupError
from serving.metrics import PHASES, Metrics
from tests.makers import scene
from tests.serving.requests import acting
from tests.serving.test_dispatcher import until


def scrape(port, host="127.0.0.1"):
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=5) as page:
        return page.read().decode()


def counted(port):
    """GetAction's calls by status."""
    pattern = r'equiserve_call_seconds_count\{code="(\w+)",method="GetAction"\} ([\d.]+)'
    return {code: int(float(n)) for code, n in re.findall(pattern, scrape(port))}


def test_calls_are_counted_by_status_and_timed_by_phase(serve, healthy):
    running = serve(policy=(str(healthy),), metrics_port=0)
    for _ in range(3):
        running.stub.GetAction(pb.GetActionRequest(observation=pack_observation(scene(0))))
    with pytest.raises(grpc.RpcError):
        running.stub.GetAction(pb.GetActionRequest())
    running.stub.GetActionBatch(pb.GetActionBatchRequest(requests=[acting(1), acting(2)]))
    text = scrape(running.server.metrics_port)
    counts = dict(re.findall(r'equiserve_call_seconds_count\{code="(\w+)",method="GetAction"\} ([\d.]+)', text))
    assert counts == {"OK": "3.0", "INVALID_ARGUMENT": "1.0"}
    for phase in ("queue", "decode", "inference", "safety", "encode"):
        of_calls = 3 if phase in ("inference", "safety", "encode") else 4  # of an action, not of a batch
        assert f'equiserve_phase_seconds_count{{phase="{phase}"}} {of_calls}.0' in text
    assert 'le="0.0001"' in text


def test_quantiles_speak_of_answers(serve, healthy):
    running = serve(policy=(str(healthy),))
    for message in (acting(1), acting(1, age_us=10**9)):
        with contextlib.suppress(grpc.RpcError):
            running.stub.GetAction(message)
    latencies = running.stub.GetStats(pb.GetStatsRequest()).latencies
    assert {(row.phase, row.samples) for row in latencies} == {(name, 1) for name in ("call", *PHASES)}


def test_a_taken_metrics_port_is_a_clear_error():
    port = Metrics().expose(0, "127.0.0.1")
    with pytest.raises(StartupError, match=f"cannot serve metrics on 127.0.0.1:{port}"):
        Metrics().expose(port, "127.0.0.1")


@pytest.mark.parametrize("status", ["CANCELLED", "DEADLINE_EXCEEDED"])
def test_who_leaves_before_his_answer_is_counted_as_he_saw_it(serve, healthy, monkeypatch, status):
    running, entered, go = serve(policy=(str(healthy),)), threading.Event(), threading.Event()
    run = running.sessions["tiny"].run
    monkeypatch.setattr(running.sessions["tiny"], "run", lambda *a: (entered.set(), go.wait(20), run(*a))[2])
    call = running.stub.GetAction.future(acting(1), timeout=20 if status == "CANCELLED" else 0.5)
    assert entered.wait(10)
    if status == "CANCELLED":
        call.cancel()
    until(call.done)
    time.sleep(0.1)  # until the server has heard of it
    go.set()
    until(running.server.metrics.call_counts)
    assert running.server.metrics.call_counts() == {("GetAction", status): 1}


def test_metrics_are_where_they_were_asked_for(serve, healthy, caplog):
    """A container's loopback interface cannot be published; a free port is of use to who is told which."""
    caplog.set_level("INFO")
    running = serve(policy=(str(healthy),), metrics_port=0, metrics_host="127.0.0.2")
    assert "equiserve_uptime_seconds" in scrape(running.server.metrics_port, "127.0.0.2")
    assert f"http://127.0.0.2:{running.server.metrics_port}/metrics" in caplog.text
    with pytest.raises(urllib.error.URLError):
        scrape(running.server.metrics_port)


def test_the_page_ends_with_its_server(serve, healthy):
    running = serve(policy=(str(healthy),), metrics_port=0)
    port = running.server.metrics_port
    running.server.stop()
    again = Metrics()
    assert again.expose(port, "127.0.0.1") == port
    again.close()


def test_who_asks_for_nothing_keeps_no_thread_and_is_not_logged(monkeypatch, capfd):
    monkeypatch.setattr("serving.metrics.ASKING_S", 0.2)
    metrics = Metrics()
    port, before = metrics.expose(0, "127.0.0.1"), threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        until(lambda: threading.active_count() > before)
        until(lambda: threading.active_count() <= before)
    metrics.close()
    assert not capfd.readouterr().err
