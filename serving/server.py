"""The command that serves policies: `python -m serving.server --policy policy.onnx`.

Start: bind, load, prove, warm up, and only then report SERVING. Stop (SIGTERM): report NOT_SERVING at once, refuse new
calls, let calls in flight finish, exit 0.
"""

import ipaddress
import logging
import math
import re
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import tyro
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.spaces import Observation
from serving.envelope import Workspace
from serving.errors import PolicyRefused, StartupError
from serving.metrics import Metrics
from serving.policy import Policy, load
from serving.proofs import prove
from serving.registry import Registry
from serving.servicer import PolicyAdminServicer, PolicyServicer

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""A 128 x 128 frame takes 64 KiB; this leaves room for views of up to 1000 x 1000 and for no more."""
QUEUE_PER_WORKER = 4
"""Calls waiting beyond this are refused RESOURCE_EXHAUSTED: an answer that comes late is of no use to a controller."""
WARM_UP_CALLS = 3
SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())


@dataclass(frozen=True)
class Config:
    """Serve policies to robots over gRPC.

    Every policy must first reproduce its golden actions, turn with the scene if it claims to, and answer to its
    gripper input; a policy that does not is refused and the server does not start.
    """

    policy: tyro.conf.UseAppendAction[tuple[str, ...]]
    """[NAME=]policy.onnx, as training.run wrote it. Repeat for several; the first is the default. NAME: what callers
    ask for; left out, the task that the file names."""
    listen: str = "localhost:50051"
    """HOST:PORT. Port 0 takes a free one; the line "serving on HOST:PORT" on stdout says which."""
    insecure: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Allow an address that other machines can reach, without encryption or authentication: anyone there can then ask
    for motions. For a container whose port is published on the loopback interface, or a network of your own."""
    intra_op_threads: int = 2
    """Threads that share one inference."""
    max_workers: int = 8
    """Calls answered at the same time."""
    valid_for_ms: float = 200.0
    """How long after its answer a controller may still apply an action."""
    workspace: tuple[float, float, float, float, float, float] | None = None
    """X0 X1 Y0 Y1 Z0 Z1: a box in the robot's base frame, metres. No motion ends outside; requests need a pose."""
    grace_s: float = 5.0
    """On SIGTERM, how long calls in flight may take to finish."""
    metrics_port: int | None = None
    """Serve Prometheus metrics on this port of the loopback interface."""

    def __post_init__(self) -> None:
        for name, low in (("intra_op_threads", 1), ("max_workers", 1), ("valid_for_ms", 0), ("grace_s", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise StartupError(f"{name} must be finite and at least {low}, got {getattr(self, name)}")
        if not self.policy:
            raise StartupError("no policy: give --policy policy.onnx")

    @property
    def box(self) -> Workspace | None:
        if self.workspace is None:
            return None
        try:
            return Workspace(low=self.workspace[::2], high=self.workspace[1::2])
        except ValueError as error:
            raise StartupError(f"--workspace X0 X1 Y0 Y1 Z0 Z1: {error}") from error


class Server:
    """A bound socket that answers UNAVAILABLE until `load`, and again after `stop`.

    Raises StartupError from the constructor when the address cannot be had, PolicyRefused from `load`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.registry, self.metrics, self.health = Registry(), Metrics(), health.HealthServicer()
        self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        pool = _Workers(config.max_workers)
        self._grpc = grpc.server(
            pool,
            options=[
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.so_reuseport", 0),  # or two servers could share a port and answer in turns
            ],
            maximum_concurrent_rpcs=config.max_workers * (1 + QUEUE_PER_WORKER),
        )
        servicer = PolicyServicer(
            self.registry,
            self.metrics,
            valid_for_us=round(config.valid_for_ms * 1000),
            workspace=config.box,
            queued_s=pool.queued_s,
        )
        pb_grpc.add_PolicyServiceServicer_to_server(servicer, self._grpc)
        pb_grpc.add_PolicyAdminServicer_to_server(PolicyAdminServicer(), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        self.address = _bind(self._grpc, config)
        if config.metrics_port is not None:
            self.metrics_port = self.metrics.expose(config.metrics_port)
        self._grpc.start()

    def load(self) -> None:
        """Load, prove and warm up every policy, then go live with all of them."""
        policies = [_proved(argument, self.config.intra_op_threads) for argument in self.config.policy]
        identities = [(policy.name, policy.version) for policy in policies]
        for policy in policies:
            if identities.count((policy.name, policy.version)) > 1:
                raise StartupError(
                    f"policy {policy.name} {policy.version} is given twice; name them apart: A={policy.file}"
                )
        self.registry.publish(policies)
        self._report(health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Report NOT_SERVING, refuse what comes, and return when calls in flight have finished or the grace is over."""
        self.health.enter_graceful_shutdown()
        self._grpc.stop(self.config.grace_s).wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _report(self, status: int) -> None:
        for service in ("", *SERVICES):  # "" is the whole server
            self.health.set(service, status)


class _Workers(ThreadPoolExecutor):
    """grpc's worker threads, and how long the call that a thread is answering had waited for one."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, thread_name_prefix="call")
        self._waited = threading.local()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        submitted = time.perf_counter()

        def timed() -> Any:
            self._waited.s = time.perf_counter() - submitted
            return fn(*args, **kwargs)

        return super().submit(timed)

    def queued_s(self) -> float:
        return getattr(self._waited, "s", 0.0)


def _bind(server: grpc.Server, config: Config) -> str:
    """Bind and return HOST:PORT with the port that was taken."""
    host, _, port = config.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise StartupError(f"--listen must be HOST:PORT, for example localhost:50051, got {config.listen!r}")
    if not _is_loopback(host) and not config.insecure:
        raise StartupError(
            f"--listen {config.listen} can be reached from other machines, and this server has no TLS yet: "
            "listen on localhost, or say --insecure if the network is yours"
        )
    # grpc is content when one of the addresses of "localhost" can be bound; a port that is half taken must not pass.
    address = f"127.0.0.1:{port}" if host == "localhost" else config.listen
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {config.listen}: is the port in use, or the address not this machine's? "
            "choose another --listen, or port 0 for a free one"
        ) from error
    return f"{host}:{bound}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # another host name: where it leads is not ours to know
        return False


def _proved(argument: str, intra_op_threads: int) -> Policy:
    named = re.fullmatch(r"([\w.-]+)=(.+)", argument)  # a name has no slash, a path may have "="
    name, path = named.groups() if named else ("", argument)
    policy = prove(load(Path(path), name, intra_op_threads=intra_op_threads))
    log.info("policy %s %s: %s", policy.name, policy.version, policy.file)
    for proof in policy.proofs:
        log.info("  proof %s: %.3g, bound %.3g (%s)", proof.name, proof.measured, proof.bound, proof.detail)
    golden = policy.manifest.golden
    for _ in range(WARM_UP_CALLS):
        start = time.perf_counter()
        policy.act(Observation(golden.depth[0], float(golden.gripper[0])))
    log.info("  warm: %.2f ms an action", (time.perf_counter() - start) * 1e3)
    return policy


def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT."""
    stopping = threading.Event()

    def stop(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)  # a second signal does not wait
        stopping.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    with Server(config) as server:
        server.load()
        print(f"serving on {server.address}", flush=True)
        stopping.wait()
        log.info("draining: no new calls, %g s for those in flight", config.grace_s)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        serve(tyro.cli(Config, prog="python -m serving.server"))
    except (PolicyRefused, StartupError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
