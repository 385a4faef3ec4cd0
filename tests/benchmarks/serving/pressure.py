"""Overload, unfair neighbours, health at saturation, batching."""

import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from serving.bench import Bench, Client
from tests.benchmarks.serving.measure import REPOSITORY, Row, benched, served

SECONDS = "8"
REFUSED_S = 0.005


def capacity(address: str) -> float:
    """Answers a second when three callers ask as fast as they are answered."""
    return benched(address, "--clients", "3", "--rate", "0", "--seconds", "6")["answers_per_second"]


def overload(policy: Path, scratch: Path) -> list[Row]:
    """Requirements 4 and 10."""
    metrics_port = free_port()
    with served(policy, "--metrics-port", str(metrics_port)) as running:
        calm = benched(running.address, "--clients", "1", "--rate", "20", "--seconds", SECONDS)["codes"]["OK"]
        most = capacity(running.address)
        health, over = [], threading.Event()
        asking = threading.Thread(target=_ask_health, args=(running.address, over, health))
        asking.start()
        flags = ("--clients", "8", "--rate", f"{2 * most / 8:.1f}", "--outstanding", "16", "--seconds", SECONDS)
        found = benched(running.address, *flags)
        over.set()
        asking.join()
        in_time = share_within(REFUSED_S, metrics_port, "RESOURCE_EXHAUSTED")
    codes = found["codes"]
    refused = codes.get("RESOURCE_EXHAUSTED", {"p99": 0.0, "count": 0})
    ratio = codes["OK"]["p99"] / calm["p99"]
    others = {code: row["count"] for code, row in codes.items() if code not in ("OK", "RESOURCE_EXHAUSTED")}
    p99 = float(np.percentile(health, 99))
    return [
        Row(
            f"twice the capacity ({most:.0f} a second): accepted calls' p99 <= 2 x unloaded",
            f"{codes['OK']['p99']:.1f} ms against {calm['p99']:.1f}: x {ratio:.2f}; "
            f"{codes['OK']['count']} accepted, {refused['count']} refused, others {others or 'none'}",
            ratio <= 2,
        ),
        Row(
            "the rest refused within 5 ms",
            f"p50 {refused.get('p50', 0):.1f}, p99 {refused['p99']:.1f} ms",
            refused["p99"] <= REFUSED_S * 1e3,
        ),
        Row(
            "the same by the server's clock, from arrival to answer, without the callers' share of these cores",
            f"{in_time:.2%} within 5 ms",
            in_time >= 0.99,
        ),
        Row("health at saturation: p99 <= 20 ms", f"{p99:.1f} ms of {len(health)} checks", p99 <= 20),
    ]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def share_within(seconds: float, metrics_port: int, code: str) -> float:
    """Of GetAction's calls with that status, how many were answered so soon."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as page:
        families = text_string_to_metric_families(page.read().decode())
    buckets = {
        float(sample.labels["le"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == "equiserve_call_seconds_bucket"
        and (sample.labels["method"], sample.labels["code"]) == ("GetAction", code)
    }
    return buckets[seconds] / buckets[float("inf")] if buckets else 1.0


def _ask_health(address: str, over: threading.Event, spent: list[float]) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while not over.wait(0.02):
            start = time.perf_counter()
            stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            spent.append((time.perf_counter() - start) * 1e3)


FLOOD = ("--clients", "1", "--rate", "200", "--outstanding", "8")
NEIGHBOUR = ("--clients", "1", "--rate", "20")


@contextmanager
def neighbours(address: str, flags: tuple[str, ...], count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Load from processes of their own; they are killed at the end, calls under way or not."""
    command = [sys.executable, "-m", "serving.bench", "--server", address, *flags, "--seconds", "600"]
    running = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield running
    finally:
        for one in running:
            one.kill()
            one.wait()


def beside(robot: str, neighbour: str, flags: tuple[str, ...], count: int, kill: bool, turns: int = 8) -> tuple:
    """Latencies of a robot at 20 Hz, alone and disturbed by turns, as the machine's own pace drifts."""
    turn_s, begin_s = 6.0, 2.5
    client = Client(Bench(server=robot, clients=1, rate=20, seconds=turns * (2 * turn_s + begin_s + 1) + 4), seed=0)
    acting = threading.Thread(target=client.run, args=(time.perf_counter(),))
    acting.start()
    time.sleep(2)
    calm, disturbed = [], []
    for _ in range(turns):
        before = len(client.tally.latency_ms["OK"])
        time.sleep(turn_s)
        calm += client.tally.latency_ms["OK"][before:]
        with neighbours(neighbour, flags, count) as running:
            time.sleep(begin_s)
            before = len(client.tally.latency_ms["OK"])
            for one in running:
                time.sleep(turn_s / count / 2)
                if kill:
                    one.kill()
                time.sleep(turn_s / count / 2)
            disturbed += client.tally.latency_ms["OK"][before:]
    acting.join()
    client.close()
    return calm, disturbed, sum(n for code, n in client.tally.counts.items() if code != "OK")


def isolation(policy: Path, scratch: Path) -> list[Row]:
    """Requirement 11. The control shows what sharing the machine's cores costs, whoever serves the neighbour."""
    rows = []
    with served(policy) as running, served(policy) as other:
        for what, address, flags, count, kill in (
            ("one that floods at 10 x", running.address, FLOOD, 1, False),
            ("one at 20 Hz that is killed mid-call", running.address, NEIGHBOUR, 1, True),
            ("the control: the same flood to a server process of its own", other.address, FLOOD, 1, False),
        ):
            calm, disturbed, failed = beside(running.address, address, flags, count, kill)
            (p50, p99), (p50_then, p99_then) = np.percentile(calm, (50, 99)), np.percentile(disturbed, (50, 99))
            rows.append(
                Row(
                    f"a 20 Hz client's p99 beside {what}: <= +20 %",
                    f"{p99:.1f} to {p99_then:.1f} ms, {p99_then / p99 - 1:+.0%}; p50 {p50:.1f} to {p50_then:.1f}; "
                    f"{len(calm)} and {len(disturbed)} calls, {failed} not answered",
                    p99_then / p99 <= 1.2,
                )
            )
    return rows


def batching(policy: Path, scratch: Path) -> list[Row]:
    """Requirement 8: what micro-batching costs a lone client, and what it brings many."""
    lone, many = {}, {}
    for name, flags in (("off", ()), ("on", ("--max-batch", "8", "--queue", "16"))):
        queue = flags or ("--queue", "16")
        with served(policy, *queue) as running:
            lone[name] = [
                benched(running.address, "--clients", "1", "--rate", "50", "--seconds", "6")["codes"]["OK"]["p50"]
                for _ in range(3)
            ]
            many[name] = benched(running.address, "--clients", "16", "--rate", "0", "--seconds", "6")[
                "answers_per_second"
            ]
    cost = np.median(lone["on"]) - np.median(lone["off"])
    return [
        Row("micro-batching costs a lone client <= 0.1 ms", f"{cost:+.2f} ms", cost <= 0.1),
        Row(
            "what it brings 16 callers (no bound)",
            f"{many['off']:.0f} to {many['on']:.0f} answers a second, x {many['on'] / many['off']:.2f}",
            True,
        ),
    ]
