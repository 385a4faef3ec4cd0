"""What can be done to a server by many, shared by the tests (short) and tests.benchmarks.serving (long)."""

import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import grpc

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving.bench import pictures
from serving.client import PolicyClient

BETWEEN_CALLS_S = 0.005
"""Callers that wait for each answer ask for all there is, and on a busy machine one of them for more than its share."""
ROOM = ("--queue", "8", "--max-wait-ms", "10000", "--client-hz", "1000")
"""For a few callers who ask as fast as they are answered: of these, nobody is refused for want of it."""
DRAINED = {"OK", "UNAVAILABLE", "CANCELLED"}
"""What callers may see of a drain. CANCELLED: met grpc's shutdown on its way, was never accepted."""
SOAKED = {"OK", "cancelled", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
"""And rude clients of a server that is all right."""
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]


def free_port() -> int:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def connect(address: str) -> grpc.Channel:
    """A connection of its own, as of another process."""
    return grpc.insecure_channel(address, options=OWN_CONNECTION)


def requests_for(address: str) -> list[pb.GetActionRequest]:
    """Good ones for the policy that is served there."""
    with PolicyClient(address) as client:
        return [pb.GetActionRequest(observation=picture) for picture in pictures(client.spec, 0)]


def drained(process: subprocess.Popen[str], address: str, clients: int = 4, before_s: float = 0.4):
    """SIGTERM under load: (exit status, what the clients saw, what the server says it answered)."""
    tally, over, requests = threading.Lock(), threading.Event(), requests_for(address)
    seen = Counter(OK=1)  # GetPolicy, for the requests

    def drive(start: int) -> None:
        with connect(address) as channel:
            stub, picture = pb_grpc.PolicyServiceStub(channel), start
            while not over.is_set():
                picture += 1
                try:
                    stub.GetAction(requests[picture % len(requests)], timeout=10)
                    code = "OK"
                except grpc.RpcError as error:
                    code = error.code().name
                with tally:
                    seen[code] += 1
                over.wait(BETWEEN_CALLS_S)

    threads = [threading.Thread(target=drive, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(before_s)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    over.set()
    for thread in threads:
        thread.join()
    (stopped,) = (line for line in log.splitlines() if "stopped: " in line)
    return process.returncode, seen, int(stopped.split("stopped: ")[1].split()[0])


class Vitals:
    """Memory, threads and descriptors of a process, from /proc."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")

    def rss_mib(self) -> float:
        pages = int((self._proc / "statm").read_text().split()[1])
        return pages * 4096 / 2**20

    def threads(self) -> int:
        return len(list((self._proc / "task").iterdir()))

    def descriptors(self) -> int:
        return len(list((self._proc / "fd").iterdir()))

    def cpu_s(self) -> float:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100


def rude_client(address: str, rate: float, over: threading.Event, seed: int, seen: Counter) -> None:
    """20 to 50 calls a second, of which 1 % are cancelled and 1 % are malformed."""
    rng, picture, requests = random.Random(seed), 0, requests_for(address)
    with connect(address) as channel:
        stub, beat = pb_grpc.PolicyServiceStub(channel), time.perf_counter()
        while not over.is_set():
            beat += 1 / rate
            time.sleep(max(0.0, beat - time.perf_counter()))
            picture, fate = picture + 1, rng.random()
            try:
                if fate < 0.01:
                    call = stub.GetAction.future(requests[picture % len(requests)], timeout=5)
                    call.cancel()
                    seen["cancelled"] += 1
                elif fate < 0.02:
                    stub.GetAction(pb.GetActionRequest(observation=pb.Observation(depth=b"nonsense")), timeout=5)
                else:
                    stub.GetAction(requests[picture % len(requests)], timeout=5)
                    seen["OK"] += 1
            except grpc.RpcError as error:
                seen[error.code().name] += 1


class Relay:
    """Passes bytes on to `upstream` and back, until it loses a connection, and says nothing."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream, self._sockets = (host, int(port)), []
        self._passing = threading.Event()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self) -> None:
        """The one that was made last; who connects anew is served."""
        self._passing.clear()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, far = self._door.accept()[0], socket.create_connection(self._upstream)
                self._sockets += [near, far]
                self._passing = passing = threading.Event()
                passing.set()
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other, passing), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, passing: threading.Event) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                if not passing.is_set():
                    return
                other.sendall(data)

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._door, *self._sockets):
            with suppress(OSError):  # who waits at it is woken
                one.shutdown(socket.SHUT_RDWR)
            one.close()
