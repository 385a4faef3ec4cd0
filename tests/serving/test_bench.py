"""The load generator counts what the server counts, and offers what it was told to."""

import json
import subprocess
import sys

import pytest

from tests.serving.conftest import REPOSITORY
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
    process, found = bench(tmp_path, "--server", running.server.address, "--seconds", 1.5, *flags)
    assert process.returncode == 0, process.stdout + process.stderr
    assert {code: row["count"] for code, row in found["codes"].items()} == counted(running.server.metrics_port)
    assert found["codes"]["OK"]["p50"] <= found["codes"]["OK"]["p99"] <= found["codes"]["OK"]["max"]
    assert f"{found['answers_per_second']:.1f} answers a second" in process.stdout


@pytest.mark.parametrize("outstanding", [1, 4])
def test_beats_are_sent_or_skipped(serve, healthy, tmp_path, outstanding):
    running = serve(policy=(str(healthy),), concurrency=1, queue=4)
    _, found = bench(
        tmp_path, "--server", running.server.address, "--rate", 40, "--seconds", 2, "--outstanding", outstanding
    )
    assert sum(row["count"] for row in found["codes"].values()) + found["skipped"] == pytest.approx(80, abs=2)


def test_it_fails_when_calls_fail(serve, healthy, tmp_path):
    running = serve(policy=(str(healthy),))
    process, _ = bench(tmp_path, "--server", running.server.address, "--policy", "nobody", "--seconds", 1)
    assert process.returncode == 2
    assert "NOT_FOUND" in process.stderr
    process, _ = bench(tmp_path, "--server", running.server.address, "--seconds", 1, "--max-p99-ms", 0.001)
    assert process.returncode == 1
