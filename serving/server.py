"""The command that serves policies: `python -m serving.server --policy policy.onnx`.

Start: bind, load, prove, warm up, and only then report SERVING. SIGHUP: look at policies and tokens again. Stop
(SIGTERM): report NOT_SERVING at once, refuse new calls, let calls in flight finish, exit 0.

Threads, not asyncio: docs/serving.md has the measurement. The model runs in the thread of its call, but
behind serving.dispatcher, so there are always threads left for health and for refusals.
"""

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving import logs
from serving.admin import PolicyAdminServicer
from serving.answering import Answering
from serving.config import Config, parse
from serving.dispatcher import Dispatcher
from serving.errors import PolicyRefused, StartupError
from serving.frames import FrameWatch
from serving.health import HealthService
from serving.libc import share_heaps
from serving.library import Library
from serving.listening import MAX_CONCURRENT_CALLS, allow_connections, bind, require_address, transport
from serving.metrics import Metrics
from serving.parsing import Parser
from serving.pipeline import Pipeline
from serving.porter import Porter, Threads
from serving.recorder import Recorder, require_folder
from serving.registry import Registry
from serving.security import Certificates, Doorman, Gate
from serving.servicer import PolicyServicer
from serving.sessions import Sessions
from serving.signals import STOPS, listen
from serving.tracing import OpenTelemetry, Tracer
from serving.workers import Workers

log = logging.getLogger(__name__)
Health = health_pb2.HealthCheckResponse

THREADS = 32
"""More than inferences and waiting calls together, so that a refusal or a health check always finds one."""
OTHER_THREADS = 16
"""For checks of health, and as many for its streams and those of reflection."""
SWITCH_S = 5e-4
"""How long a thread may keep the interpreter from others: at Python's 5 ms, refusals and health would wait so long."""
LAME_DUCK_S = 0.5
"""Within this, a robot at 20 Hz has asked, tried three times again and told how its episode went: 0.25 s."""
LAST_S, LOOK_EACH_S = 0.5, 0.02
"""For threads to end that have done what they were asked, and for what they wrote to go out. How often a server that
stops looks whether they have."""
SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())


class Server:
    """A bound socket that answers UNAVAILABLE until `load`, and again after `stop`.

    Raises StartupError from the constructor when the address cannot be had, PolicyRefused from `load`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        sys.setswitchinterval(SWITCH_S)
        self.registry, self.metrics, self.health = Registry(), Metrics(), HealthService()
        self.stopping = threading.Event()
        """Set when it is time to `stop`."""
        self._reported: set[str] = set()
        self._report(Health.NOT_SERVING)
        self.library = Library(
            self.registry, self.metrics, config.policy, config.policies, config.intra_op_threads, config.bounds,
            changed=self._report_policies,
        )  # fmt: skip
        self.gate = Gate(config.tokens)
        self.dispatcher = Dispatcher(
            config.concurrency,
            config.queue,
            config.max_batch,
            max_wait_s=config.max_wait_ms / 1e3,
            client_hz=config.client_hz,
        )
        self.sessions = Sessions(config.max_episodes, config.episode_idle_s)
        self.recorder: Recorder | None = None
        threads = min(max(THREADS, 2 * (config.concurrency + config.queue)), MAX_CONCURRENT_CALLS)
        self._workers = Workers(threads)
        tracer = OpenTelemetry() if config.trace else Tracer()
        self.answering = Answering(self.metrics, self.gate, tracer, self._workers.arrival)
        self._porter = Porter(
            self.dispatcher,
            self.gate,
            self.answering,
            threads=threads,
            checks=Threads(OTHER_THREADS),
            streams=Threads(OTHER_THREADS),
        )
        doorman = [Doorman(self.gate, self.answering.refuse)] if config.tokens else []
        self._grpc = transport(self._workers, [*doorman, self._porter, Parser(self.answering.refuse)])
        self._register()
        self.address = bind(self._grpc, config)
        self._record_and_count()
        self._porter.start()
        self._workers.start()
        self._grpc.start()

    def _register(self) -> None:
        """What answers which call."""
        config = self.config
        pipeline = Pipeline(
            self.registry,
            self.dispatcher,
            FrameWatch(config.frame_rules),
            self.metrics,
            limits=config.bounds,
            valid_for_s=config.valid_for_ms / 1e3,
            recorder=lambda: self.recorder,
        )
        servicer = PolicyServicer(
            self.registry, self.answering, self.dispatcher, self.sessions, pipeline, recorder=lambda: self.recorder
        )
        pb_grpc.add_PolicyServiceServicer_to_server(servicer, self._grpc)
        admin = PolicyAdminServicer(self.library, self.answering, self.stopping.set)
        pb_grpc.add_PolicyAdminServicer_to_server(admin, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)

    def load(self) -> bool:
        """Load, prove and warm up every policy, then go live with all of them; False: told to stop before that."""
        live = self.library.open(self.config.default_policy, stopped=self.stopping.is_set)
        if live:
            self._report(Health.SERVING)
        return live

    def reload_tokens(self) -> None:
        """Look at the tokens again; a file that does not fit changes nothing."""
        try:
            self.gate.reload()
        except StartupError as error:
            log.error("tokens: the ones before stay: %s", error)

    def stop(self) -> None:
        """Report NOT_SERVING, refuse what comes, and return when calls in flight have finished or the grace is over.

        How episodes ended is heard for a moment more.
        """
        already, self.answering.draining = self.answering.draining, True
        self.health.enter_graceful_shutdown()
        if not already and len(self.metrics.call_counts()):
            # A call that meets grpc's own shutdown on its way is CANCELLED; for a moment, say UNAVAILABLE instead, so
            # that callers have ended their episodes and are elsewhere by then.
            time.sleep(min(LAME_DUCK_S, self.config.grace_s))
        self._finish_calls()
        self._workers.shutdown(wait=False)
        self._porter.close()
        answered = sum(n for (_, code), n in self.metrics.call_counts().items() if code == "OK")
        log.info(
            "stopped: %d calls answered, %d refused", answered, sum(self.metrics.call_counts().values()) - answered
        )
        if self.recorder is not None:
            self.recorder.close()
        self.metrics.close()
        self.answering.tracer.flush()
        self._workers.ended(LAST_S)

    def _finish_calls(self) -> None:
        """Take none that is new, and return when those in flight are answered, or the grace is over."""
        over = self._grpc.stop(self.config.grace_s)
        while not self._workers.at_rest and not over.wait(LOOK_EACH_S):
            pass
        # gRPC also waits until every client has hung up, and an idle one on its older event loop may take 5 s to notice
        # that it should. All replies are written by now.
        over.wait(LAST_S)
        self._grpc.stop(None).wait()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way any more: an inference, or a policy's proofs, may outlive the grace."""
        return self._workers.ended(0) and not self.library.is_busy

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _report(self, status: int) -> None:
        for service in ("", *SERVICES):  # "" is the whole server
            self.health.set(service, status)

    def _report_policies(self) -> None:
        """A policy's health goes by its name."""
        live = {p.name for p in self.registry}
        for name in self._reported - live:
            self.health.set(name, Health.NOT_SERVING)
        for name in live if not self.answering.draining else ():
            self.health.set(name, Health.SERVING)
        self._reported |= live

    def _record_and_count(self) -> None:
        """As far as that is asked for."""
        config, mib = self.config, 2**20
        self._watch()
        if config.record:
            size, total = config.record_file_mib * mib, config.record_total_mib * mib
            self.recorder = Recorder(config.record, size, total, config.bounds)
        if config.metrics_port is not None:
            self.metrics_port = self.metrics.expose(config.metrics_port, config.metrics_host)

    def _watch(self) -> None:
        watch = self.metrics.watch
        self.metrics.watch_proofs(self.registry)
        watch("uptime_seconds", "Since the server was made.", lambda: self.metrics.uptime_s)
        watch("running", "Inferences under way.", lambda: self.dispatcher.running)
        watch("waiting", "Calls that wait for the model.", lambda: self.dispatcher.waiting)
        watch("open_episodes", "Episodes under way.", lambda: len(self.sessions))
        count = self.metrics.watch_count
        count("expired", "Calls that left the line unanswered.", lambda: self.dispatcher.expired)
        count("flight_recorded", "Messages recorded.", lambda: self.recorder.recorded if self.recorder else 0)
        count("flight_dropped", "Messages not recorded.", lambda: self.recorder.dropped if self.recorder else 0)


def check(config: Config) -> str:
    """What would be served. Raises what a start would raise, except for an address or a port that cannot be had."""
    require_address(config)
    library = Library(Registry(), Metrics(), config.policy, config.policies, config.intra_op_threads, config.bounds)
    library.open(config.default_policy)
    if config.tls_cert and config.tls_key:
        Certificates(config.tls_cert, config.tls_key, config.tls_client_ca)
    Gate(config.tokens)
    if config.record:
        require_folder(config.record, make=False)
    if config.trace:
        OpenTelemetry()
    served = ", ".join(f"{p.name} {p.version}" for p in library.registry)
    return f"the configuration is good; it serves {served}, by default {library.registry.default}"


def serve(config: Config) -> None:
    """Serve until SIGTERM, SIGINT or PolicyAdmin.Drain."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what it asks for is about to be done; else it would end the process
    share_heaps()
    allow_connections()
    with Server(config) as server:
        refresh = threading.Event()
        listen(dict.fromkeys(STOPS, server.stopping) | {signal.SIGHUP: refresh})
        refresh_when(refresh, server)
        if server.load():
            gc.collect()
            gc.freeze()  # what a start leaves stays: to look through it again would stop every call for 26 to 52 ms
            print(f"serving on {server.address}", flush=True)
            server.stopping.wait()
        log.info("draining: no new calls, %g s for those in flight", config.grace_s)
    if not server.is_idle:
        log.warning("a call, or a policy's proofs, are under way after all this time, and end here")
        logging.shutdown()
        os._exit(0)  # a thread that comes back from onnxruntime while Python ends would abort the process


def refresh_when(asked: threading.Event, server: Server) -> None:
    """Look at tokens and policies again whenever `asked` is set, in threads of their own: policies that take long to
    prove themselves, at the start, too, must not keep a token from being revoked."""
    policies = threading.Event()

    def tokens() -> None:
        try:
            server.reload_tokens()
        finally:
            policies.set()

    for event, action in ((asked, tokens), (policies, server.library.refresh)):
        threading.Thread(target=_whenever, args=(event, action), name="refresh", daemon=True).start()


def _whenever(event: threading.Event, action: Callable[[], object]) -> None:
    while event.wait():
        event.clear()
        try:
            action()
        except Exception:  # the next signal may revoke a token: whatever failed, it must be heard
            log.exception("SIGHUP: not all of it could be done; what was before stays")


def main() -> int:
    try:
        config = parse()
        logs.configure(config.log_format)
        if config.check_config:
            print(check(config))
        else:
            serve(config)
    except (PolicyRefused, StartupError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
