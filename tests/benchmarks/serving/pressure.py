"""Overload, unfair neighbours, health at saturation, batching."""

import threading
import time
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.benchmarks.serving.measure import Row, benched, served

SECONDS = "8"


def capacity(address: str) -> float:
    """Answers a second when three callers ask as fast as they are answered."""
    return benched(address, "--clients", "3", "--rate", "0", "--seconds", "6")["answers_per_second"]


def overload(policy: Path, scratch: Path) -> list[Row]:
    """Requirements 4 and 10."""
    with served(policy) as running:
        calm = benched(running.address, "--clients", "1", "--rate", "20", "--seconds", SECONDS)["codes"]["OK"]
        most = capacity(running.address)
        health, over = [], threading.Event()
        asking = threading.Thread(target=_ask_health, args=(running.address, over, health))
        asking.start()
        flags = ("--clients", "8", "--rate", f"{2 * most / 8:.1f}", "--outstanding", "16", "--seconds", SECONDS)
        found = benched(running.address, *flags)
        over.set()
        asking.join()
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
            refused["p99"] <= 5,
        ),
        Row("health at saturation: p99 <= 20 ms", f"{p99:.1f} ms of {len(health)} checks", p99 <= 20),
    ]


def _ask_health(address: str, over: threading.Event, spent: list[float]) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while not over.wait(0.02):
            start = time.perf_counter()
            stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            spent.append((time.perf_counter() - start) * 1e3)


def isolation(policy: Path, scratch: Path) -> list[Row]:
    """Requirement 11: a robot at 20 Hz beside one that floods at ten times its rate, and beside one that is killed."""
    robot = ("--clients", "1", "--rate", "20", "--seconds", "12")
    rows = []
    with served(policy) as running:
        alone = [benched(running.address, *robot)["codes"]["OK"]["p99"] for _ in range(3)]
        flooding = threading.Thread(
            target=benched,
            args=(running.address, "--clients", "1", "--rate", "200", "--outstanding", "8", "--seconds", "42"),
        )
        flooding.start()
        time.sleep(1)
        beside = [benched(running.address, *robot)["codes"]["OK"]["p99"] for _ in range(3)]
        flooding.join()
    change = np.median(beside) / np.median(alone) - 1
    rows.append(
        Row(
            "a neighbour floods at 10 x: a 20 Hz client's p99 moves by <= 20 %",
            f"{np.median(alone):.1f} to {np.median(beside):.1f} ms, {change:+.0%}",
            change <= 0.2,
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
