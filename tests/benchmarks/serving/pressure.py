"""Overload, unfair neighbours, health at saturation, batching."""

import math
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving.bench import Bench, Client
from serving.connection import Connection
from tests.benchmarks.serving.measure import REPOSITORY, Row, apart, benched, served
from tests.serving.load import connect, free_port, requests_for

SECONDS = "8"
REFUSED_S = 0.005
LONE_CALLS = 2000


def capacity(address: str) -> float:
    """Answers a second when three callers ask as fast as they are answered."""
    return benched(address, "--clients", "3", "--rate", "0", "--seconds", "6")["answers_per_second"]


def overload(policy: Path, scratch: Path) -> list[Row]:
    """Requirements 4 and 10."""
    metrics_port = free_port()
    with apart() as cores, served(policy, "--metrics-port", str(metrics_port), cores=cores) as running:
        calm = benched(running.address, "--clients", "1", "--rate", "20", "--seconds", SECONDS)["codes"]["OK"]
        most = capacity(running.address)
        health, over = [], threading.Event()
        asking = threading.Thread(target=_ask_health, args=(running.address, over, health))
        asking.start()
        before = {code: buckets_of(metrics_port, code) for code in ("OK", "RESOURCE_EXHAUSTED")}
        flags = ("--clients", "8", "--rate", f"{2 * most / 8:.1f}", "--outstanding", "16", "--seconds", SECONDS)
        found = benched(running.address, *flags)
        over.set()
        asking.join()
        here = {code: 1e3 * p99_within_s(buckets_of(metrics_port, code) - earlier) for code, earlier in before.items()}
    codes = found["codes"]
    refused = codes.get("RESOURCE_EXHAUSTED", {"p50": 0.0, "p99": 0.0, "count": 0})
    ratio = codes["OK"]["p99"] / calm["p99"]
    others = {code: row["count"] for code, row in codes.items() if code not in ("OK", "RESOURCE_EXHAUSTED")}
    p99 = float(np.percentile(health, 99))
    return [
        Row(
            f"server and callers on a core each, twice the capacity ({most:.0f} a second): accepted calls' "
            "p99 <= 2 x unloaded",
            f"{codes['OK']['p99']:.1f} ms against {calm['p99']:.1f}: x {ratio:.2f}; "
            f"{codes['OK']['count']} accepted, {refused['count']} refused, others {others or 'none'}",
            ratio <= 2 and not others,
        ),
        Row(
            "the rest refused within 5 ms",
            f"p50 {refused['p50']:.1f}, p99 {refused['p99']:.1f} ms; by the server's clock p99 within "
            f"{here['RESOURCE_EXHAUSTED']:g} ms, of accepted calls within {here['OK']:g} ms",
            refused["count"] > 0 and refused["p99"] <= REFUSED_S * 1e3,
        ),
        Row("health at saturation: p99 <= 20 ms", f"{p99:.1f} ms of {len(health)} checks", p99 <= 20),
    ]


def buckets_of(metrics_port: int, code: str) -> Counter[float]:
    """How many of GetAction's calls with that status took up to so many seconds by now, by the server's clock."""
    return Counter(
        {
            float(sample.labels["le"]): int(sample.value)
            for sample in samples(metrics_port, "equiserve_call_seconds_bucket")
            if (sample.labels["method"], sample.labels["code"]) == ("GetAction", code)
        }
    )


def samples(metrics_port: int, name: str) -> list[Sample]:
    """What the server's metrics have under that name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as page:
        families = text_string_to_metric_families(page.read().decode())
    return [sample for family in families for sample in family.samples if sample.name == name]


def p99_within_s(buckets: Counter[float]) -> float:
    """The bucket into which the p99 falls."""
    return min((le for le, count in buckets.items() if count >= 0.99 * buckets[math.inf]), default=0.0)


def _ask_health(address: str, over: threading.Event, spent: list[float]) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while not over.wait(0.02):
            start = time.perf_counter()
            stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            spent.append((time.perf_counter() - start) * 1e3)


@dataclass(frozen=True)
class Neighbour:
    """Load from a process of its own."""

    flags: tuple[str, ...]
    killed: bool = False
    """In the middle of the time that counts."""


FLOOD = Neighbour(("--clients", "1", "--rate", "200", "--outstanding", "8"))
BUSY = Neighbour(("--clients", "1", "--rate", "0"))
"""Has always a call under way."""
TURNS, TURN_S, BEGIN_S = 8, 6.0, 2.5
LOADS = 3
"""In one turn."""
AFTER_S = 1.0
"""What a kill can disturb. Later, whoever was killed would no longer be in the way, either."""


def seen(client: Client, seconds: float) -> list[float]:
    """Milliseconds of the client's answers from now on."""
    before = len(client.tally.latency_ms["OK"])
    time.sleep(seconds)
    return client.tally.latency_ms["OK"][before:]


def spend(client: Client, address: str, neighbour: Neighbour | None) -> list[float]:
    """What the client sees in one turn, beside that neighbour."""
    if neighbour is None:
        return seen(client, TURN_S)
    # On the core that callers share, the client that is measured comes first, at once: the lowest priority of the usual
    # policy would let the other finish its slice.
    command = ["chrt", "--idle", "0", sys.executable, "-m", "serving.bench", "--server", address, *neighbour.flags]
    command += ["--seconds", "600"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        time.sleep(BEGIN_S)
        found = seen(client, TURN_S / 2)
        if neighbour.killed:
            process.kill()
        found += seen(client, AFTER_S if neighbour.killed else TURN_S / 2)
        process.kill()
    return found


def beside(
    robot: str, address: str, calm: Neighbour | None, disturbed: Neighbour
) -> tuple[list[float], list[float], dict[str, int]]:
    """A robot at 20 Hz with the one and the other in turns, as the machine drifts: its milliseconds, and refusals."""
    quiet, loud = [], []
    with controller(robot, TURNS * 2 * (TURN_S + BEGIN_S + 1)) as client:
        for _ in range(TURNS):
            quiet += spend(client, address, calm)
            loud += spend(client, address, disturbed)
    return quiet, loud, refusals(client)


@contextmanager
def controller(address: str, seconds: float) -> Iterator[Client]:
    """A robot that asks at 20 Hz for so long, and has begun."""
    client = Client(Bench(clients=1, rate=20, seconds=seconds + 4, connection=Connection(address)), seed=0)
    acting = threading.Thread(target=client.run, args=(time.perf_counter(),))
    acting.start()
    time.sleep(2)
    try:
        yield client
    except BaseException:
        client.stop()
        raise
    finally:
        acting.join()
        client.close()


def refusals(client: Client) -> dict[str, int]:
    return {code: n for code, n in client.tally.counts.items() if code != "OK"}


def isolation(policy: Path, scratch: Path) -> list[Row]:
    """Requirement 11. The control shows what sharing the machine's cores costs, whoever serves the neighbour."""
    rows = []
    with apart() as cores, served(policy, cores=cores) as running, served(policy, cores=cores) as other:
        for what, address, before, after, most in (
            ("alone, then beside one that floods at 10 x", running.address, None, FLOOD, 1.2),
            ("beside one that is always calling, then beside one that is killed mid-call", running.address, BUSY,
             replace(BUSY, killed=True), 1.2),
            ("the control: alone, then beside the flood of another server", other.address, None, FLOOD, math.inf),
        ):  # fmt: skip
            calm, disturbed, refused = beside(running.address, address, before, after)
            (p50, p99), (p50_then, p99_then) = np.percentile(calm, (50, 99)), np.percentile(disturbed, (50, 99))
            rows.append(
                Row(
                    f"server and callers on a core each: a 20 Hz client's p99, {what}"
                    f"{': <= +20 %' if most < math.inf else ' (no bound)'}",
                    f"{p99:.1f} to {p99_then:.1f} ms, {p99_then / p99 - 1:+.0%}; p50 {p50:.1f} to {p50_then:.1f}; "
                    f"{len(calm)} and {len(disturbed)} calls, others {refused or 'none'}",
                    p99_then / p99 <= most and not refused,
                )
            )
    return rows


def loads(policy: Path, scratch: Path) -> list[Row]:
    """Requirement 6, as a robot sees it: beside its calls, policies are read, prove themselves and warm up."""
    quiet, loud, count = [], [], 0
    folder = scratch / "policies"
    folder.mkdir()
    (folder / "0.onnx").symlink_to(policy)
    metrics_port = free_port()
    with served(policy, "--policies", str(folder), "--metrics-port", str(metrics_port)) as running:
        before = live_loads(metrics_port)
        with controller(running.address, TURNS * 2 * TURN_S) as client:
            for _ in range(TURNS):
                quiet += seen(client, TURN_S)
                for _ in range(LOADS):
                    count += 1
                    (folder / f"{count - 1}.onnx").rename(folder / f"{count}.onnx")
                    running.process.send_signal(signal.SIGHUP)
                    loud += seen(client, TURN_S / LOADS)
        loaded = live_loads(metrics_port) - before
    (p50, p99), (p50_then, p99_then) = np.percentile(quiet, (50, 99)), np.percentile(loud, (50, 99))
    return [
        Row(
            f"a 20 Hz client, alone, then while a policy is loaded every {TURN_S / LOADS:g} s: no refusal",
            f"p99 {p99:.1f} to {p99_then:.1f} ms, p50 {p50:.1f} to {p50_then:.1f}, most {max(quiet):.1f} to "
            f"{max(loud):.1f}; {loaded} of {count} loads done, "
            f"{len(quiet)} and {len(loud)} calls, others {refusals(client) or 'none'}",
            not refusals(client) and loaded > count / 2,
        )
    ]


def live_loads(metrics_port: int) -> int:
    """Policies that went live so far."""
    loads = samples(metrics_port, "equiserve_policy_loads_total")
    return sum(int(sample.value) for sample in loads if sample.labels["result"] == "live")


def batching(policy: Path, scratch: Path) -> list[Row]:
    """Requirement 8: what micro-batching costs a lone client, and what it brings many."""
    lone, many = {"off": [], "on": []}, {}
    waits = ("--queue", "16", "--max-wait-ms", "1000")  # nobody is refused
    with served(policy, *waits) as off, served(policy, *waits, "--max-batch", "8") as on:
        servers = {"off": off.address, "on": on.address}
        requests = requests_for(off.address)
        with connect(off.address) as to_off, connect(on.address) as to_on:
            stubs = {"off": pb_grpc.PolicyServiceStub(to_off), "on": pb_grpc.PolicyServiceStub(to_on)}
            for i in range(LONE_CALLS):
                for name, stub in stubs.items():
                    start = time.perf_counter()
                    stub.GetAction(requests[i % len(requests)], timeout=5)
                    lone[name].append((time.perf_counter() - start) * 1e3)
        for name, address in servers.items():
            found = benched(address, "--clients", "16", "--rate", "0", "--seconds", "6")
            many[name] = found["answers_per_second"]
    cost = np.median(lone["on"]) - np.median(lone["off"])
    return [
        Row(
            f"micro-batching costs a lone client <= 0.1 ms, {LONE_CALLS} calls with and without in turns",
            f"{cost:+.3f} ms over {np.median(lone['off']):.2f}",
            cost <= 0.1,
        ),
        Row(
            "what it brings 16 callers (no bound)",
            f"{many['off']:.0f} to {many['on']:.0f} answers a second, x {many['on'] / many['off']:.2f}",
            True,
        ),
    ]
