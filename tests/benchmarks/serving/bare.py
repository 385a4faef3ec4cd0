"""The least that a gRPC server in Python can be: bytes come, `session.run`, bytes go. What ours is compared with.

`python -m tests.benchmarks.serving.bare policy.onnx` is its process.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np

import serving  # noqa: F401  # the same event loop as the server's
from protos.codec import unpack_observation
from protos.manifest import INPUTS
from protos.spaces import Observation
from serving.bench import pictures
from serving.policy import load
from tests.benchmarks.serving.measure import REPOSITORY
from tests.serving.load import connect

REPLY = bytes(256)
"""As long as an answer, or longer."""
METHOD = "/bare.Policy/Run"


def feed(observation: Observation) -> dict[str, np.ndarray]:
    """What `session.run` takes of it."""
    images = observation.depth[None, None], np.full((1, 1), observation.gripper, np.float32)
    return dict(zip(INPUTS, images, strict=True))


class _Bare(grpc.GenericRpcHandler):
    def __init__(self, policy: Path) -> None:
        loaded = load(policy, intra_op_threads=2)
        spec = loaded.spec
        self._session, self._feed = loaded.session, feed(unpack_observation(pictures(spec, 0)[0], spec.observation))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._run)

    def _run(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._session.run(None, self._feed)
        return REPLY


@contextmanager
def bare(policy: Path) -> Iterator[Callable[[bytes], bytes]]:
    """A method of it, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.serving.bare", str(policy)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            with connect(process.stdout.readline().strip()) as channel:
                method = channel.unary_unary(METHOD)
                yield lambda request: method(request, timeout=5)
        finally:
            process.kill()


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(4), handlers=(_Bare(Path(sys.argv[1])),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    print(address, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
