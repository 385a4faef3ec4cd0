"""Load for a policy server, yours or ours: `python -m serving.bench --server localhost:50051 --clients 4 --rate 50`.

Each client has its own connection and sends at its own fixed rate, like a robot. Latencies are the client's: from
sending a request to having its answer.
"""

import asyncio
import contextlib
import itertools
import json
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import tyro

from protos.codec import pack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.files import require_writable, write_atomically
from protos.spaces import Observation, PolicySpec
from serving.client import PolicyClient, PolicyError
from serving.connection import Connection

PICTURES = 16
CONNECT_S = 30.0
"""How long to wait for a server that is still proving its policies."""


@dataclass(frozen=True)
class Bench:
    """Ask a server for actions at a fixed rate, and say how it did.

    A client with an answer outstanding skips its beat, as a robot would, unless --outstanding allows more: with many,
    load is offered whatever the server does (open loop), which is how overload is measured.

    Exit code 1 when no call was answered, one failed otherwise than by being refused for load, or p99 is above
    --max-p99-ms; 2 when there could be no load; 130 when it was interrupted: then what was measured is printed, and
    not written; else 0.
    """

    clients: int = 1
    rate: float = 20.0
    """Calls per second of each client; 0: as fast as answers come."""
    seconds: float = 10.0
    outstanding: int = 1
    """Calls of one client that may be under way."""
    policy: str = ""
    """Empty: the server's default."""
    deadline_ms: float = 1000.0
    connection: Annotated[Connection, tyro.conf.arg(name="")] = field(default_factory=Connection)
    pose: tuple[float, float, float] = (0.5, 0.0, 0.2)
    """Where the tool is, x, y and z in the robot's base frame in metres, for a server that keeps a workspace."""
    max_p99_ms: float = math.inf
    """Of the calls that were answered."""
    output: Path | None = None
    """Write the numbers here too, as JSON."""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.pose)):
            raise ValueError(f"--pose must be three finite numbers, got {self.pose}")
        for name, low in (("clients", 1), ("outstanding", 1), ("seconds", 0.1), ("rate", 0), ("deadline_ms", 1)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")


class Interrupted(KeyboardInterrupt):
    """A load, before its end: what each client saw, in so many seconds."""

    def __init__(self, tallies: "list[Tally]", took: float) -> None:
        super().__init__("interrupted")
        self.tallies, self.took = tallies, took


@dataclass
class Tally:
    """What one client saw. Latencies in milliseconds by gRPC status; beats that found too many calls under way."""

    latency_ms: dict[str, list[float]] = field(default_factory=dict)
    server_ms: list[float] = field(default_factory=list)
    """decode + safety + encode of each answer: the server's work apart from the model."""
    skipped: int = 0

    def note(self, code: str, sent: float, answer: pb.GetActionResponse | None = None) -> None:
        """A call that was sent then (time.perf_counter) has just ended."""
        self.latency_ms.setdefault(code, []).append((time.perf_counter() - sent) * 1e3)
        if answer is not None:
            timing = answer.timing
            self.server_ms.append((timing.decode_us + timing.safety_us + timing.encode_us) / 1e3)

    @property
    def counts(self) -> Counter[str]:
        return Counter({code: len(spent) for code, spent in self.latency_ms.items()})


def connect(bench: Bench, kind: Any = grpc) -> Any:
    """A connection of its own, of grpc or grpc.aio: channels to one address would otherwise share one."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    server, tls = bench.connection.server, bench.connection.tls
    if tls is None:
        return kind.insecure_channel(server, options=options)
    return kind.secure_channel(server, tls.credentials(), options=options)


def pictures(spec: PolicySpec, seed: int) -> list[pb.Observation]:
    """Different frames within the contract: a plane with boxes on it."""
    rng, o = np.random.default_rng(seed), spec.observation
    made = []
    for _ in range(PICTURES):
        plane = 0.4 * (o.depth_max_m - o.depth_min_m)
        depth = np.full(o.shape, o.depth_min_m + plane, np.float32)
        for row, col in rng.integers(0, o.height * 3 // 4, (3, 2)):  # three on one another stay below the camera
            depth[row : row + o.height // 4, col : col + o.width // 4] -= np.float32(rng.uniform(0.05, 0.3) * plane)
        made.append(pack_observation(Observation(depth, float(rng.integers(2)))))
    return made


class Client:
    """One robot's worth of load."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self._bench, self.tally, self._stopped = bench, Tally(), threading.Event()
        self._metadata = bench.connection.metadata
        self._deadline_s = bench.deadline_ms / 1e3
        self._channel = connect(bench)
        self._stub = pb_grpc.PolicyServiceStub(self._channel)
        # On the connection that is measured: a first call would else wait for TCP and TLS, too.
        asked = pb.GetPolicyRequest(name=bench.policy)
        info = self._stub.GetPolicy(asked, timeout=CONNECT_S, metadata=self._metadata, wait_for_ready=True).policy
        self._requests = [
            pb.GetActionRequest(observation=picture, policy=bench.policy)
            for picture in pictures(PolicySpec.from_json(info.contract), seed)
        ]
        for request in self._requests:
            x, y, z = bench.pose
            request.observation.pose.CopyFrom(pb.Pose(x=x, y=y, z=z))

    def run(self, start: float) -> None:
        """Send from `start` (time.perf_counter) for the bench's time, one call after another, as a controller does."""
        rate = self._bench.rate
        for beat, due in self._beats(start):
            if self._stopped.wait(max(0.0, due - time.perf_counter())):
                return
            if rate and time.perf_counter() >= due + 1 / rate:
                self.tally.skipped += 1  # the answer before came too late for this beat
            else:
                self._ask(self._requests[beat % PICTURES])

    def _beats(self, start: float) -> Iterator[tuple[int, float]]:
        """Each beat of the bench's time and when it is due; those that no time is left for are skipped."""
        bench = self._bench
        for beat in itertools.count():
            now = time.perf_counter()
            due = start + beat / bench.rate if bench.rate else now
            if max(now, due) >= start + bench.seconds:
                self.tally.skipped += max(0, math.ceil(bench.seconds * bench.rate) - beat)
                return
            yield beat, due

    def _ask(self, request: pb.GetActionRequest) -> None:
        sent = time.perf_counter()
        try:
            answer = self._stub.GetAction(request, timeout=self._deadline_s, metadata=self._metadata)
            self.tally.note("OK", sent, answer)
        except grpc.RpcError as error:
            self.tally.note(error.code().name, sent)

    async def run_open(self, channel: Any, start: float) -> None:
        """The same with many calls under way, on one thread: their callbacks' threads would be in each other's way."""
        stub, free = pb_grpc.PolicyServiceStub(channel), asyncio.Semaphore(self._bench.outstanding)
        under_way: set[asyncio.Task[None]] = set()
        for beat, due in self._beats(start):
            # Also where it is due: answers that have come are taken before a beat is skipped for want of them.
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if self._bench.rate and free.locked():
                self.tally.skipped += 1
            else:
                await free.acquire()
                task = asyncio.create_task(self._ask_beside(stub, self._requests[beat % PICTURES], free))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    async def _ask_beside(self, stub: Any, request: pb.GetActionRequest, free: asyncio.Semaphore) -> None:
        sent = time.perf_counter()
        try:
            answer = await stub.GetAction(request, timeout=self._deadline_s, metadata=self._metadata)
            self.tally.note("OK", sent, answer)
        except grpc.RpcError as error:
            self.tally.note(error.code().name, sent)
        finally:
            free.release()

    def stop(self) -> None:
        """Before its time: after the call that is under way."""
        self._stopped.set()

    def close(self) -> None:
        self._channel.close()


def load(bench: Bench) -> tuple[list[Tally], float]:
    """Run all clients; what each saw, and how many seconds it took. Raises Interrupted."""
    print(f"waiting for {bench.connection.server}, {CONNECT_S:g} s at most", file=sys.stderr)
    with PolicyClient.of(bench.connection, bench.policy) as asking:
        asking.wait_ready(CONNECT_S)
    clients = [Client(bench, seed) for seed in range(bench.clients)]
    tallies, began = [client.tally for client in clients], time.perf_counter()
    try:
        took = _closed_loop(bench, clients) if bench.outstanding == 1 else asyncio.run(_open_loop(bench, clients))
    except KeyboardInterrupt:
        raise Interrupted(tallies, time.perf_counter() - began) from None
    for client in clients:
        client.close()
    return tallies, max(took, bench.seconds)  # the last beat's period belongs to it


def _starts(bench: Bench) -> list[float]:
    """When each client begins, spread over one period: robots do not beat together."""
    soon = time.perf_counter() + 0.1
    return [soon + (i / bench.clients / bench.rate if bench.rate else 0.0) for i in range(bench.clients)]


def _closed_loop(bench: Bench, clients: list[Client]) -> float:
    starts = _starts(bench)
    threads = [threading.Thread(target=c.run, args=(at,)) for c, at in zip(clients, starts, strict=True)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        for client in clients:
            client.stop()
        for thread in threads:
            thread.join()
        raise
    return time.perf_counter() - starts[0]


async def _open_loop(bench: Bench, clients: list[Client]) -> float:
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connect(bench, grpc.aio)) for _ in clients]
        try:
            await asyncio.wait_for(asyncio.gather(*(channel.channel_ready() for channel in channels)), CONNECT_S)
        except TimeoutError as error:  # of asyncio's, without a word
            raise TimeoutError(
                f"{bench.connection.server} has not taken a connection within {CONNECT_S:g} s"
            ) from error
        starts = _starts(bench)
        await asyncio.gather(*(c.run_open(*at) for c, *at in zip(clients, channels, starts, strict=True)))
        return time.perf_counter() - starts[0]


def summary(tallies: list[Tally], took: float) -> dict[str, Any]:
    """Counts, rates and quantiles over all clients."""
    by_code: dict[str, list[float]] = {}
    for tally in tallies:
        for code, spent in tally.latency_ms.items():
            by_code.setdefault(code, []).extend(spent)
    server = [ms for tally in tallies for ms in tally.server_ms]
    return {
        "seconds": took,
        "answers_per_second": len(by_code.get("OK", [])) / took,
        "skipped": sum(tally.skipped for tally in tallies),
        "codes": {code: {"count": len(spent), **quantiles(spent)} for code, spent in sorted(by_code.items())},
        "server_work_ms": quantiles(server) if server else {},
    }


def quantiles(milliseconds: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(milliseconds, (50, 95, 99))
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": max(milliseconds)}


def lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['answers_per_second']:.1f} answers a second; {found['skipped']} beats skipped"
    yield f"{'':20}{'count':>8}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}  ms"
    for code, row in found["codes"].items():
        numbers = "".join(f"{row[q]:9.2f}" for q in ("p50", "p95", "p99", "max"))
        yield f"{code:20}{row['count']:8}{numbers}"
    if found["server_work_ms"]:
        numbers = "".join(f"{found['server_work_ms'][q]:9.2f}" for q in ("p50", "p95", "p99", "max"))
        yield f"{'server, model apart':28}{numbers}"


def main() -> int:
    try:
        bench = tyro.cli(Bench, prog="python -m serving.bench")
        if bench.output:
            require_writable(bench.output)
        found = summary(*load(bench))
        print("\n".join(lines(found)))
        if bench.output:
            write_atomically(bench.output, (json.dumps(found, indent=2) + "\n").encode())
    except Interrupted as interrupted:
        print("\n".join(lines(summary(interrupted.tallies, interrupted.took))))
        print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (PolicyError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 2
    failed = set(found["codes"]) - {"OK", "RESOURCE_EXHAUSTED"}
    answered = found["codes"].get("OK")
    return int(bool(failed) or answered is None or answered["p99"] > bench.max_p99_ms)


if __name__ == "__main__":
    sys.exit(main())
