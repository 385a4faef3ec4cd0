"""The load generator counts what the server counts, and offers what it was told to."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.codec import unpack_observation
from protos.errors import Rejected, Status
from protos.spaces import ACTION, PolicySpec
from serving.bench import main, pictures
from serving.security import new_token
from serving.server import LAME_DUCK_S, Server
from tests.makers import settings, small_spec
from tests.serving.conftest import REPOSITORY
from tests.serving.test_dispatcher import until
from tests.serving.test_metrics import counted


def bench(tmp_path, *flags):
    command = [sys.executable, "-m", "serving.bench", "--output", str(tmp_path / "found.json"), *map(str, flags)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    path = tmp_path / "found.json"
    return process, json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize(
    "flags",
    [
        ("--clients", 2, "--rate", 30),
        ("--clients", 2, "--rate", 0),
        ("--clients", 3, "--rate", 300, "--outstanding", 8),
        ("--clients", 2, "--rate", 0, "--outstanding", 4),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_it_sees_what_the_server_saw(serve, healthy, tmp_path, flags):
    running = serve(policy=(str(healthy),), metrics_port=0, concurrency=1, queue=1)
    patient = ("--deadline-ms", 20_000)  # a busy machine may stop anyone for a second
    process, found = bench(tmp_path, "--server", running.server.address, "--seconds", 0.5, *patient, *flags)
    assert process.returncode == 0, process.stdout + process.stderr
    assert {code: row["count"] for code, row in found["codes"].items()} == counted(running.server.metrics_port)
    assert found["codes"]["OK"]["p50"] <= found["codes"]["OK"]["p99"] <= found["codes"]["OK"]["max"]
    assert f"{found['answers_per_second']:.1f} answers a second" in process.stdout


@pytest.mark.parametrize("outstanding", [1, 4])
def test_beats_are_sent_or_skipped(serve, healthy, tmp_path, outstanding):
    running = serve(policy=(str(healthy),), concurrency=1, queue=4)
    _, found = bench(
        tmp_path, "--server", running.server.address, "--rate", 40, "--seconds", 1, "--outstanding", outstanding
    )
    assert sum(row["count"] for row in found["codes"].values()) + found["skipped"] == pytest.approx(40, abs=2)


def test_it_fails_when_calls_fail(serve, healthy, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.server.LAME_DUCK_S", LAME_DUCK_S)  # here somebody calls while the server is stopped
    running = serve(policy=(str(healthy),))
    process, _ = bench(tmp_path, "--server", running.server.address, "--policy", "nobody", "--seconds", 1)
    assert process.returncode == 2
    assert "NOT_FOUND" in process.stderr
    process, _ = bench(tmp_path, "--server", running.server.address, "--seconds", 0.3, "--max-p99-ms", 0.001)
    assert process.returncode == 1
    with ThreadPoolExecutor(1) as pool:
        before = running.server.metrics.call_counts().get(("GetAction", "OK"), 0)
        asking = pool.submit(bench, tmp_path, "--server", running.server.address, "--seconds", 2)
        until(lambda: running.server.metrics.call_counts().get(("GetAction", "OK"), 0) > before, 60)
        running.server.stop()
        process, found = asking.result()
    assert process.returncode == 1, process.stderr
    assert "UNAVAILABLE" in found["codes"]


def test_it_fails_when_nothing_is_answered(serve, healthy, tmp_path, monkeypatch):
    running = serve(policy=(str(healthy),))

    def full(*_args, **_how):
        raise Rejected("server", "room", "none", "send less often", Status.RESOURCE_EXHAUSTED)

    monkeypatch.setattr(running.server.dispatcher, "admit", full)
    process, found = bench(tmp_path, "--server", running.server.address, "--seconds", 0.5)
    assert found["codes"].keys() == {"RESOURCE_EXHAUSTED"}
    assert process.returncode == 1


def test_where_its_figures_cannot_be_written_no_load_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serving.bench", "--output", str(tmp_path)])
    monkeypatch.setattr("serving.bench.load", lambda _: pytest.fail("load"))
    assert main() == 2
    assert f"'{tmp_path}'" in capsys.readouterr().err


def test_what_was_measured_is_told_where_it_can_no_longer_be_written(tmp_path, monkeypatch, capsys):
    def measured(bench):
        bench.output.mkdir()
        return [], 1.0

    monkeypatch.setattr(sys, "argv", ["serving.bench", "--output", str(tmp_path / "found.json")])
    monkeypatch.setattr("serving.bench.load", measured)
    assert main() == 2
    said = capsys.readouterr()
    assert "answers a second" in said.out
    assert "found.json" in said.err


@pytest.mark.parametrize("outstanding", ["1", "4"])
def test_what_was_measured_is_told_when_it_is_interrupted(serve, healthy, outstanding):
    running = serve(policy=(str(healthy),))
    flags = ["--server", running.server.address, "--seconds", "1000", "--outstanding", outstanding]
    hearing = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also in a background job
    command = [sys.executable, "-c", f"{hearing}; from serving.bench import main; exit(main())", *flags]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: running.server.metrics.call_counts().get(("GetAction", "OK"), 0) > 3, 60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "\nOK " in out
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err


def test_an_interrupted_wait_is_told(monkeypatch, capsys):
    def waiting(_self, _seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("serving.client.PolicyClient.wait_ready", waiting)
    monkeypatch.setattr(sys, "argv", ["serving.bench"])
    assert main() == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_it_waits_for_a_server_that_is_still_proving(healthy, tmp_path):
    with Server(settings(healthy)) as server, ThreadPoolExecutor(1) as pool:
        asked = ("--server", server.address, "--seconds", 0.5, "--deadline-ms", 20_000)
        asking = pool.submit(bench, tmp_path, *asked)
        until(lambda: server.metrics.call_counts().get(("GetPolicy", "UNAVAILABLE"), 0) > 1, 60)
        server.load()
        process, found = asking.result()
    assert process.returncode == 0, process.stderr
    assert found["codes"].keys() == {"OK"}


def test_it_is_let_in_like_a_robot(serve, healthy, tmp_path):
    """By a token, with a pose for a server that keeps a workspace."""
    secret, box = new_token("load", ("act",), tmp_path / "tokens"), (0.3, 0.7, -0.25, 0.25, 0.0, 0.5)
    running = serve(policy=(str(healthy),), tokens=tmp_path / "tokens", workspace=box)
    (tmp_path / "secret").write_text(f"{secret}\n")
    flags = ("--server", running.server.address, "--token-file", tmp_path / "secret")
    flags += ("--seconds", 0.5, "--deadline-ms", 20_000)
    process, found = bench(tmp_path, *flags)
    assert process.returncode == 0, process.stdout + process.stderr
    assert found["codes"].keys() == {"OK"}


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.2), st.floats(0.01, 1.0))
def test_frames_lie_within_the_contract(seed, low, more):
    observation = replace(small_spec().observation, depth_min_m=low, depth_max_m=low + more)
    for picture in pictures(PolicySpec(observation, ACTION), seed):
        unpack_observation(picture, observation)
