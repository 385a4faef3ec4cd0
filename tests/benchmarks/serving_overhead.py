"""What a GetAction costs over the bare model: `python -m tests.benchmarks.serving_overhead [policy.onnx]`.

Calls alternate between the two in one run, so that a busy machine slows both. Server and client share this process.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from protos.spaces import ACTION, OBSERVATION, Observation, PolicySpec
from serving.client import PolicyClient
from serving.config import Config
from serving.server import Server
from tests.makers import tiny_policy_file

CALLS = 1000


def timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "policy.onnx"
        if len(sys.argv) == 1:
            tiny_policy_file(path, PolicySpec(OBSERVATION, ACTION))
        with Server(Config(policy=(str(path),), listen="localhost:0")) as server:
            server.load()
            policy = server.registry.resolve("", "")
            golden = policy.manifest.golden
            observation = Observation(golden.depth[0], float(golden.gripper[0]))
            with PolicyClient(server.address) as client:
                client.act(observation)
                pairs = [
                    (timed_ms(lambda: policy.act(observation)), timed_ms(lambda: client.act(observation)))
                    for _ in range(CALLS)
                ]
    bare, served = np.percentile(pairs, (50, 95, 99), axis=0).T
    for name, row in (("session.run", bare), ("GetAction", served), ("difference", served - bare)):
        print(f"{name:12} p50 {row[0]:6.2f}  p95 {row[1]:6.2f}  p99 {row[2]:6.2f} ms")
    print(f"ratio of medians {served[0] / bare[0]:.2f}")


if __name__ == "__main__":
    main()
