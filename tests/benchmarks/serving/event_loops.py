"""gRPC's newer event loop against its older one: `python -m tests.benchmarks.serving.event_loops`.

An empty method, a 64 KiB request, a process for each side, the two in turns. Decides the switch in serving/__init__.py.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import tyro
from tqdm import tqdm

LOOPS = {"newer": "", "older": "-event_engine_client,-event_engine_listener"}
ROUNDS, CALLS, WARM_UP = 10, 300, 30
PAUSE_S = 0.003
"""Between calls, as controllers pause: a thread that still spins would answer sooner."""
REQUEST = bytes(range(256)) * 256


class _Empty(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")


def serve() -> None:
    server = grpc.server(ThreadPoolExecutor(4), handlers=(_Empty(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


def call(port: str) -> None:
    """Print the milliseconds of each call."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/empty/empty")
        for number in range(WARM_UP + CALLS):
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            method(REQUEST, timeout=5)
            if number >= WARM_UP:
                print((time.perf_counter() - start) * 1e3)


def started(switches: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.benchmarks.serving.event_loops", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"GRPC_EXPERIMENTS": switches})


def main() -> None:
    times: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    for _ in tqdm(range(ROUNDS), unit="round"):
        for loop, switches in LOOPS.items():
            with started(switches, "serve") as server:
                assert server.stdout is not None
                with started(switches, "call", server.stdout.readline().strip()) as client:
                    assert client.stdout is not None
                    times[loop] += map(float, client.stdout)
                server.kill()
    print(f"grpcio {grpc.__version__}\n\n| event loop | p50, ms | p99, ms |\n|---|---|---|")
    for loop, each in times.items():
        print("| {} | {:.2f} | {:.2f} |".format(loop, *np.percentile(each, (50, 99))))


if __name__ == "__main__":
    side = {"serve": serve, "call": call}.get("".join(sys.argv[1:2]))  # what `started` asks of its own processes
    side(*sys.argv[2:]) if side else tyro.cli(main, description=__doc__)
