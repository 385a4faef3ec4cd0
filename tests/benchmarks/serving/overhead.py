"""What serving costs over the bare model, at rest and when nobody calls."""

import contextlib
import time
from pathlib import Path

import numpy as np

from protos.codec import unpack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.spaces import Observation
from serving.bench import pictures
from serving.policy import load
from tests.benchmarks.serving.measure import Row, served
from tests.serving.load import Vitals, connect

PAIRS = 2000
BLOCK, WARM_UP = 50, 5
"""Calls in a row to one server, and before them those that do not count."""
IDLE_S = 20.0
SAFE = ("--workspace", "-2", "2", "-2", "2", "-2", "2", "--limits", "step_m", "0.08")


def timed_ms(call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def pairs(policy: Path, record: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of a server that records and of one that does not, each asked for a block of calls in turns; all else on.

    Returns:
        [2, PAIRS, 2] ms of session.run and of GetAction in turns, and [2, PAIRS] ms of the server's own work.
    """
    bare = load(policy, intra_op_threads=2)
    frames = pictures(bare.spec, 0)
    seen: list[Observation] = [unpack_observation(frame, bare.spec.observation) for frame in frames]
    requests = [pb.GetActionRequest(observation=frame) for frame in frames]
    for request in requests:
        request.observation.pose.CopyFrom(pb.Pose(x=0.5, z=0.2))
    times, work = np.empty((2, PAIRS, 2)), np.empty((2, PAIRS))
    with contextlib.ExitStack() as stack:
        stubs = []
        for recording in ((), ("--record", str(record))):
            running = stack.enter_context(served(policy, *SAFE, "--metrics-port", "0", *recording))
            stubs.append(pb_grpc.PolicyServiceStub(stack.enter_context(connect(running.address))))
        for start in range(0, PAIRS, BLOCK):
            for recorded, stub in enumerate(stubs):
                for i in range(start - WARM_UP, start + BLOCK):
                    k, answers = i % len(frames), []
                    first = timed_ms(lambda k=k: bare.act(seen[k]))
                    second = timed_ms(lambda k=k, a=answers, s=stub: a.append(s.GetAction(requests[k], timeout=5)))
                    if i >= start:
                        t = answers[0].timing
                        times[recorded, i] = first, second
                        work[recorded, i] = (t.decode_us + t.queue_us + t.safety_us + t.encode_us) / 1e3
    return times, work


def overhead(policy: Path, scratch: Path) -> list[Row]:
    """Requirement 1, and the recorder's share (13)."""
    both, work = pairs(policy, scratch / "flight")
    bare, called = np.percentile(both[1], (50, 99), axis=0).T
    more = called - bare
    allowed = max(0.1 * bare[0], 1.0), max(0.25 * bare[1], 3.0)
    (bare_without, without), (bare_with, recorded) = np.median(both, axis=1)
    recorder = (recorded - bare_with) - (without - bare_without)
    share = recorder / without
    return [
        Row(
            f"GetAction minus `session.run`, {PAIRS} interleaved pairs: p50 <= {allowed[0]:.2f} ms, "
            f"p99 <= {allowed[1]:.2f} ms",
            f"{more[0]:.2f} and {more[1]:.2f} ms, over {bare[0]:.2f} and {bare[1]:.2f} ms",
            more[0] <= allowed[0] and more[1] <= allowed[1],
        ),
        Row(
            "server's work outside inference: p50 <= 0.3 ms", f"{np.median(work[1]):.2f} ms", np.median(work[1]) <= 0.3
        ),
        Row("flight recorder on: p50 cost <= 2 %", f"{recorder * 1e3:+.0f} µs, {share:+.1%}", share <= 0.02),
    ]


def idle(policy: Path, scratch: Path) -> list[Row]:
    """Requirement 1: an idle server uses no processor."""
    with served(policy, "--record", str(scratch / "idle"), "--metrics-port", "0") as running:
        vitals = Vitals(running.process.pid)
        time.sleep(2)
        before = vitals.cpu_s()
        time.sleep(IDLE_S)
        share = (vitals.cpu_s() - before) / IDLE_S
    return [Row("idle server: <= 1 % of a core", f"{share:.1%}", share <= 0.01)]
