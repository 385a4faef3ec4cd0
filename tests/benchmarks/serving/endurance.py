"""Fuzz, random outputs, bad networks, reloads, drains and hours: much of what the tests do a little of."""

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving.policy import load
from serving.proofs import prove
from serving.security import new_token
from tests.benchmarks.serving.measure import REPOSITORY, Row, served
from tests.makers import tiny_policy_file
from tests.serving.conftest import start
from tests.serving.load import DRAINED, ROOM, SOAKED, Vitals, connect, drained, rude_client
from tests.serving.test_admin import reloads_under_load
from tests.serving.test_envelope import random_outputs_outside
from tests.serving.test_episodes import bad_network
from tests.serving.test_fuzz import fuzz

SOAK_MINUTES, WARM_MINUTES = 20.0, 8.0
"""Measured, and before that: until the seventh minute memory rises by steps, as heaps and queues find their size."""
KILL_EACH_S, CYCLE_S = 10.0, 30.0
"""In a cycle a file of the recording is filled and closed: its index, and what waits to be written, come and go."""


def fuzzing(policy: Path, scratch: Path, count: int = 100_000) -> list[Row]:
    """Requirement 2."""
    running = start(policy=(f"tiny={tiny_policy_file(scratch / 'tiny.onnx')}",), max_episodes=10**6)
    seen, leaked = fuzz(running.channel, count)
    running.server.stop()
    codes = Counter()
    for (_, code), n in seen.items():
        codes[code] += n
    told = ", ".join(f"{code} {n}" for code, n in codes.most_common())
    return [Row(f"{count} fuzzed messages: no crash, INTERNAL or traceback", f"{len(leaked)}; {told}", not leaked)]


def envelope(policy: Path, scratch: Path, count: int = 1_000_000) -> list[Row]:
    """Requirement 3."""
    outside, silent = random_outputs_outside(count)
    measured = f"{outside} outside, {silent} changed silently"
    return [
        Row(
            f"{count} random outputs, NaN and infinities among them: none leaves the limits",
            measured,
            not outside + silent,
        )
    ]


def order(policy: Path, scratch: Path, steps: int = 10_000) -> list[Row]:
    """Requirement 5."""
    file = tiny_policy_file(scratch / "order.onnx")
    running = start(policy=(str(file),), queue=8, max_wait_ms=1000.0)
    stale, doubled, swapped = bad_network(running, prove(load(file)), steps)
    running.server.stop()
    measured = f"{stale} stale, {doubled} doubled, {swapped} swapped"
    bad = stale + doubled + swapped
    return [Row(f"{steps} steps, 1 % each lost, doubled, reordered, late: none wrong", measured, not bad)]


def reloads(policy: Path, scratch: Path, count: int = 100) -> list[Row]:
    """Requirement 6, in a process of its own so that its memory can be watched."""
    folder = scratch / "policies"
    folder.mkdir()
    tiny_policy_file(folder / "door.onnx")
    token = new_token("operator", ("admin",), scratch / "tokens")
    command = [sys.executable, "-m", "serving.server", "--policies", str(folder), "--tokens", str(scratch / "tokens")]
    command += ["--listen", "localhost:0", "--queue", "8"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        address, vitals = process.stdout.readline().split()[-1], Vitals(process.pid)

        class Caller:
            channel = connect(address)
            stub = pb_grpc.PolicyServiceStub(channel)

        admin, metadata = pb_grpc.PolicyAdminStub(Caller.channel), (("authorization", f"Bearer {token}"),)
        reloads_under_load(Caller, admin, metadata, folder, reloads=20, clients=4)  # warm
        before = vitals.rss_mib()
        errors, mixed, episodes = reloads_under_load(Caller, admin, metadata, folder, reloads=count, clients=4)
        grown = vitals.rss_mib() - before
        process.terminate()
    measured = f"{len(errors)} errors, {mixed} of {episodes} episodes mixed, {grown:+.1f} MiB"
    return [
        Row(
            f"{count} reloads under 4 clients: no errors, no mixed episodes, RSS <= +5 MiB",
            measured,
            not errors and not mixed and episodes > 0 and grown <= 5,
        )
    ]


def drains(policy: Path, scratch: Path, count: int = 20) -> list[Row]:
    """Requirement 10."""
    good, seen = 0, Counter()
    for _ in range(count):
        with served_to_end(policy) as (process, address):
            status, codes, answered = drained(process, address, before_s=random.uniform(0.3, 0.8))
        seen += codes
        good += status == 0 and codes["OK"] == answered > 0 and set(codes) <= DRAINED
    told = ", ".join(f"{code} {n}" for code, n in seen.most_common())
    return [
        Row(
            f"{count} drains under load: exit 0, no accepted call fails",
            f"{good} of {count}; callers saw {told}",
            good == count,
        )
    ]


class served_to_end:
    """A server whose log is read by who ends it."""

    def __init__(self, policy: Path) -> None:
        command = [sys.executable, "-m", "serving.server", "--policy", str(policy), "--listen", "localhost:0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([*command, *ROOM], cwd=REPOSITORY, **pipes)

    def __enter__(self):
        return self._process, self._process.stdout.readline().split()[-1]

    def __exit__(self, *exception):
        self._process.kill()
        self._process.wait()


KILLED = """
import sys, threading
from collections import Counter
from tests.serving.load import rude_client
rude_client(sys.argv[1], 50.0, threading.Event(), 0, Counter())
"""


def _killing(address: str) -> Iterator[None]:
    """For one cycle: a client lives, is given time, and is killed."""
    for _ in range(round(CYCLE_S / KILL_EACH_S)):
        victim = subprocess.Popen([sys.executable, "-c", KILLED, address], cwd=REPOSITORY)
        yield
        victim.kill()
        victim.wait()


def _least(read: Callable[[], float], seconds: float) -> float:
    """Of two readings a second."""
    readings = []
    for _ in range(round(2 * seconds)):
        time.sleep(0.5)
        readings.append(read())
    return min(readings)


def soak(policy: Path, scratch: Path, minutes: float = SOAK_MINUTES, warm: float = WARM_MINUTES) -> list[Row]:
    """Requirement 14."""
    seen, over, samples = Counter(), threading.Event(), []
    with served(policy, "--record", str(scratch / "soak"), "--metrics-port", "0", "--queue", "8",
                "--record-total-mib", "512") as running:  # fmt: skip
        threads = [threading.Thread(target=rude_client, args=(running.address, 50.0, over, i, seen)) for i in range(4)]
        for thread in threads:
            thread.start()
        vitals, begun = Vitals(running.process.pid), time.monotonic()
        while (now := time.monotonic() - begun) < (warm + minutes) * 60:
            least = min(_least(vitals.rss_mib, KILL_EACH_S) for _ in _killing(running.address))
            print(f"soak: {now / 60:.1f} of {warm + minutes:g} minutes, {least:.1f} MiB", file=sys.stderr)
            if now > warm * 60:
                samples.append((now / 3600, least, vitals.threads(), vitals.descriptors()))
        over.set()
        for thread in threads:
            thread.join()
    hours, rss, threads_seen, descriptors = np.array(samples).T
    slope = np.polyfit(hours, rss, 1)[0]
    flat = max(np.ptp(threads_seen), np.ptp(descriptors)) <= 4
    told = ", ".join(f"{code} {n}" for code, n in seen.most_common())
    return [
        Row(
            f"soak of {minutes:g} minutes after {warm:g} to warm up, 50 Hz x 4 with 1 % cancels, 1 % malformed, a "
            f"client killed every {KILL_EACH_S:g} s: RSS slope <= 1 MiB/h, threads and descriptors flat",
            f"{slope:+.1f} MiB/h at {rss[-1]:.0f} MiB; threads {threads_seen.min():.0f} to {threads_seen.max():.0f}, "
            f"descriptors {descriptors.min():.0f} to {descriptors.max():.0f}; {told}",
            slope <= 1 and flat and set(seen) <= SOAKED,
        )
    ]
