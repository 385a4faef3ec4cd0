"""What serving costs over the bare model, at rest and when nobody calls."""

import contextlib
import time
from pathlib import Path

import numpy as np

from protos.codec import unpack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving.bench import pictures
from serving.policy import load
from tests.benchmarks.serving.bare import bare, feed
from tests.benchmarks.serving.measure import Row, served
from tests.serving.load import Vitals, connect

PAIRS = 2000
WARM_UP = 50
"""Calls that do not count."""
BLOCK, PAUSE_S = 20, 0.01
"""Calls in a row to one server, where two are compared, and how long before each: as robots call. Back to back, nothing
could be done beside the calls."""
IDLE_S = 20.0
SAFE = ("--workspace", "-2", "2", "-2", "2", "-2", "2", "--limits", "step_m", "0.08")


def timed_ms(call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def pairs(policy: Path, record: Path) -> tuple[np.ndarray, np.ndarray]:
    """With everything on, the recorder too.

    Returns:
        [PAIRS, 4] ms of session.run, GetAction, session.run and a bare gRPC server's, in turns, and [PAIRS] ms of the
        server's own work.
    """
    local = load(policy, intra_op_threads=2)
    frames = pictures(local.spec, 0)
    feeds = [feed(unpack_observation(frame, local.spec.observation)) for frame in frames]
    requests = requests_of(frames)
    contents = [request.SerializeToString() for request in requests]
    times, work = np.empty((PAIRS, 4)), np.empty(PAIRS)
    with (
        served(policy, *SAFE, "--metrics-port", "0", "--record", str(record)) as running,
        connect(running.address) as channel,
        bare(policy) as run,
    ):
        stub = pb_grpc.PolicyServiceStub(channel)
        for i in range(-WARM_UP, PAIRS):
            k, answers = i % len(frames), []
            each = [
                timed_ms(call)
                for call in (
                    lambda k=k: local.session.run(None, feeds[k]),
                    lambda k=k, a=answers: a.append(stub.GetAction(requests[k], timeout=5)),
                    lambda k=k: local.session.run(None, feeds[k]),
                    lambda k=k: run(contents[k]),
                )
            ]
            if i >= 0:
                t = answers[0].timing
                times[i] = each
                work[i] = (t.decode_us + t.queue_us + t.safety_us + t.encode_us) / 1e3
    return times, work


def requests_of(frames: list[pb.Observation]) -> list[pb.GetActionRequest]:
    requests = [pb.GetActionRequest(observation=frame) for frame in frames]
    for request in requests:
        request.observation.pose.CopyFrom(pb.Pose(x=0.5, z=0.2))
    return requests


def with_and_without(policy: Path, record: Path) -> np.ndarray:
    """[PAIRS / BLOCK, 2, BLOCK] ms of GetAction without a recorder and with one, in turns, as the machine drifts.

    A block is longer than the recorder waits before it writes: what it writes of a block, it writes within it.
    """
    times = np.empty((PAIRS // BLOCK, 2, BLOCK))
    with contextlib.ExitStack() as stack:
        stubs = []
        for recording in ((), ("--record", str(record))):
            running = stack.enter_context(served(policy, *SAFE, "--metrics-port", "0", *recording))
            stubs.append(pb_grpc.PolicyServiceStub(stack.enter_context(connect(running.address))))
        requests = requests_of(pictures(load(policy).spec, 0))
        for block in range(-1, len(times)):
            for recorded in (0, 1) if block % 2 else (1, 0):
                for i in range(BLOCK):
                    time.sleep(PAUSE_S)
                    request, stub = requests[(block * BLOCK + i) % len(requests)], stubs[recorded]
                    times[block, recorded, i] = timed_ms(lambda s=stub, r=request: s.GetAction(r, timeout=5))
    return times  # the block before the first was overwritten by the last


def overhead(policy: Path, scratch: Path) -> list[Row]:
    """Requirement 1, and the recorder's share (13)."""
    times, work = pairs(policy, scratch / "flight")
    alone = np.percentile(times[:, 0], (50, 99))
    more = np.percentile(times[:, 1] - times[:, 0], (50, 99))
    allowed = max(0.1 * alone[0], 1.0), max(0.25 * alone[1], 3.0)
    least = np.percentile(times[:, 3] - times[:, 2], (50, 99))
    both = with_and_without(policy, scratch / "with")
    middle = np.median(both, axis=2)
    recorder, without = np.median(middle[:, 1] - middle[:, 0]), np.median(middle[:, 0])
    share = recorder / without
    return [
        Row(
            f"GetAction minus `session.run`, {PAIRS} interleaved pairs: p50 <= {allowed[0]:.2f} ms, "
            f"p99 <= {allowed[1]:.2f} ms",
            f"{more[0]:.2f} and {more[1]:.2f} ms, over {alone[0]:.2f} and {alone[1]:.2f} ms",
            more[0] <= allowed[0] and more[1] <= allowed[1],
        ),
        Row(
            "the same of a gRPC server that does nothing but `session.run` (no bound)",
            f"{least[0]:.2f} and {least[1]:.2f} ms",
            True,
        ),
        Row("server's work outside inference: p50 <= 0.3 ms", f"{np.median(work):.2f} ms", np.median(work) <= 0.3),
        Row(
            f"flight recorder on: p50 cost <= 2 %, {PAIRS} calls with and without, at most {1 / PAUSE_S:.0f} a second",
            f"{recorder * 1e3:+.0f} µs, {share:+.1%}",
            share <= 0.02,
        ),
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
