"""Why the server has threads: `python -m tests.benchmarks.serving.threads_or_asyncio [policy.onnx]`.

The same work (decode, infer, pack) behind grpc's threads and behind grpc.aio with inference in an executor, as it must
not run on the event loop. Calls go to both in turns; then eight callers load each.
"""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import tyro

from protos.codec import pack_action, unpack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving.bench import pictures
from serving.policy import Policy, load
from tests.serving.load import connect

CALLS, CALLERS, SECONDS = 2000, 8, 6.0
AT_ONCE = 2
"""Inferences, behind both."""


@dataclass(frozen=True)
class Compare:
    policy: tyro.conf.Positional[Path] = Path("runs/demo/policy.onnx")
    """A policy of the cpu preset, as `make demo` leaves it."""


def answered(policy: Policy, request: pb.GetActionRequest) -> pb.GetActionResponse:
    proposal = policy.act(unpack_observation(request.observation, policy.spec.observation))
    return pb.GetActionResponse(action=pack_action(proposal.action, policy.spec.action))


class Threads(pb_grpc.PolicyServiceServicer):
    def __init__(self, policy: Policy) -> None:
        self._policy, self._places = policy, threading.Semaphore(AT_ONCE)

    def GetAction(self, request, context):
        with self._places:
            return answered(self._policy, request)


class Asyncio(pb_grpc.PolicyServiceServicer):
    def __init__(self, policy: Policy) -> None:
        self._policy, self._pool = policy, ThreadPoolExecutor(AT_ONCE)

    async def GetAction(self, request, context):
        return await asyncio.get_running_loop().run_in_executor(self._pool, answered, self._policy, request)


def with_threads(policy: Policy) -> str:
    server = grpc.server(ThreadPoolExecutor(32))
    pb_grpc.add_PolicyServiceServicer_to_server(Threads(policy), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with_threads.server = server  # type: ignore[attr-defined]  # kept alive
    return f"127.0.0.1:{port}"


def with_asyncio(policy: Policy) -> str:
    ready, address = threading.Event(), []

    async def serve() -> None:
        server = grpc.aio.server()
        pb_grpc.add_PolicyServiceServicer_to_server(Asyncio(policy), server)
        address.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        ready.set()
        await server.wait_for_termination()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    ready.wait()
    return address[0]


def throughput(address: str, requests: list[pb.GetActionRequest]) -> tuple[float, float]:
    """(answers a second, p99 ms) of CALLERS that ask as fast as they are answered."""
    spent, over = [], time.perf_counter() + SECONDS

    def drive(i: int) -> None:
        with connect(address) as channel:
            stub = pb_grpc.PolicyServiceStub(channel)
            while (start := time.perf_counter()) < over:
                stub.GetAction(requests[i % len(requests)])
                spent.append(time.perf_counter() - start)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(drive, range(CALLERS)))
    return len(spent) / SECONDS, float(np.percentile(spent, 99)) * 1e3


def main() -> None:
    asked = tyro.cli(Compare, description=__doc__)
    policy = load(asked.policy, intra_op_threads=2)
    requests = [pb.GetActionRequest(observation=frame) for frame in pictures(policy.spec, 0)]
    addresses = {"threads": with_threads(policy), "asyncio": with_asyncio(policy)}
    stubs = {name: pb_grpc.PolicyServiceStub(connect(address)) for name, address in addresses.items()}
    spent = {name: [] for name in addresses}
    for i in range(CALLS + 50):
        for name, stub in stubs.items():
            start = time.perf_counter()
            stub.GetAction(requests[i % len(requests)])
            if i >= 50:
                spent[name].append((time.perf_counter() - start) * 1e3)
    print("| server | p50, ms | p99, ms | 8 callers: answers a second | their p99, ms |\n|---|---|---|---|---|")
    for name, address in addresses.items():
        rate, p99 = throughput(address, requests)
        p50, tail = np.percentile(spent[name], (50, 99))
        print(f"| {name} | {p50:.2f} | {tail:.2f} | {rate:.0f} | {p99:.1f} |")


if __name__ == "__main__":
    main()
