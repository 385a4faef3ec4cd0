"""What the server counts and times, for Prometheus and for GetStats."""

import bisect
import contextlib
import itertools
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from serving.errors import StartupError
from serving.policy import Policy

log = logging.getLogger(__name__)

# 0.1 ms to 10 s: a small policy answers in one millisecond, a paper-size one on a loaded machine in a hundred.
BUCKETS_S = (*(base * scale for scale in (1e-4, 1e-3, 1e-2, 1e-1, 1.0) for base in (1, 2, 5)), 10.0)
PHASES = ("decode", "queue", "inference", "safety", "encode")
ASKING_S = 10.0
"""Who is connected to /metrics and asks nothing for so long is left: he would keep a thread for ever."""
RECENT = 4096
"""Calls that GetStats' quantiles speak of."""


class Phases:
    """Where one call's time goes: `with phases.timed("decode"): ...`, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", 0.0

    def timed(self, name: str) -> "Phases":
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self._name] = time.perf_counter() - self._start

    def us(self, name: str) -> int:
        return round(self.seconds.get(name, 0.0) * 1e6)


class Metrics:
    """Own registry, so that several servers can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._started = time.monotonic()
        self._page: WSGIServer | None = None
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in ("call", *PHASES)}
        self._timings = _Timings()
        self.registry.register(self._timings)
        self._interventions = self._counter("interventions", "Changes by the safety envelope.", "field", "rule")
        self._holds = self._counter("holds", "Answers that were to stay, because the policy's was no action.", "policy")
        self._warnings = self._counter("frame_warnings", "Frames that were suspicious.")
        self._reloads = self._counter("policy_loads", "Policies that were to be loaded, by result.", "result")

    def record(self, method: str, code: str, seconds: float, phases: Phases) -> None:
        """One call, once its status is known."""
        self._timings.observe(method, code, seconds, phases.seconds if method == "GetAction" else {})
        if code == "OK" and method == "GetAction":
            self._recent["call"].append(seconds)
            for phase, spent in phases.seconds.items():
                self._recent[phase].append(spent)

    def intervened(self, field: str, rule: str) -> None:
        self._interventions.labels(field, rule).inc()

    def held(self, policy: str) -> None:
        self._holds.labels(policy).inc()

    def warned(self) -> None:
        self._warnings.inc()

    def loaded(self, result: str) -> None:
        """`result`: "live" or "refused"."""
        self._reloads.labels(result).inc()

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(f"equiserve_{name}", text, registry=self.registry).set_function(read)

    def watch_count(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A count that somebody else keeps, read when it is asked for."""
        self.registry.register(_Count(f"equiserve_{name}", text, read))

    def watch_proofs(self, live: Iterable[Policy]) -> None:
        """What those policies measured when they were loaded that are in `live` when it is asked for."""
        self.registry.register(_Proofs(live))

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started

    def call_counts(self) -> dict[tuple[str, str], int]:
        """Calls that ended, by (method, code)."""
        return self._timings.counts()

    def intervention_counts(self) -> dict[tuple[str, str], int]:
        """Changes by the envelope, by (field, rule)."""
        samples = [s for family in self._interventions.collect() for s in family.samples]
        totals = [s for s in samples if s.name == "equiserve_interventions_total"]
        return {(s.labels["field"], s.labels["rule"]): int(s.value) for s in totals}

    def quantiles_ms(self) -> dict[str, tuple[float, float, float, float, int]]:
        """p50, p95, p99, maximum and number of the recent answers, by phase and for the whole call."""
        found = {}
        for name, recent in self._recent.items():
            seconds = np.array(recent.copy())
            if len(seconds):
                p50, p95, p99 = np.percentile(seconds, (50, 95, 99)) * 1e3
                found[name] = float(p50), float(p95), float(p99), float(seconds.max()) * 1e3, len(seconds)
        return found

    def expose(self, port: int, host: str) -> int:
        """Serve /metrics; the port in use (0 asks for a free one)."""
        try:
            server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise StartupError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
        server.RequestHandlerClass = _Handler
        self._page = server
        log.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, server.server_port)
        return server.server_port

    def close(self) -> None:
        """Serve /metrics no more."""
        if self._page is not None:
            self._page.shutdown()
            self._page.server_close()
            self._page = None

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"equiserve_{name}", text, labels, registry=self.registry)


class _Handler(WSGIRequestHandler):
    """Quiet, also about who asks nothing."""

    def setup(self) -> None:
        self.request.settimeout(ASKING_S)
        super().setup()

    def handle(self) -> None:
        with contextlib.suppress(TimeoutError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class _Count(Collector):
    name: str
    text: str
    read: Callable[[], float]

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self.name, self.text, value=self.read())


@dataclass(frozen=True)
class _Proofs(Collector):
    live: Iterable[Policy]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        text = "What a live policy's proof measured at load; beside it the bound."
        family = GaugeMetricFamily("equiserve_proof_error", text, labels=["policy", "version", "proof", "what"])
        for policy in self.live:
            for proof in policy.proofs:
                of = [policy.name, policy.version, proof.name]
                family.add_metric([*of, "measured"], proof.measured)
                family.add_metric([*of, "bound"], proof.bound)
        yield family


class _Histogram:
    """How many of what was observed fell into each bucket, and their sum."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BUCKETS_S) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self.sum += seconds

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        names = [*map(str, BUCKETS_S), "+Inf"]
        family.add_metric(labels, list(zip(names, itertools.accumulate(self.counts), strict=True)), self.sum)


class _Timings(Collector):
    """Six histograms of every call under one lock: six of prometheus_client's own cost 50 microseconds a call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: defaultdict[tuple[str, str], _Histogram] = defaultdict(_Histogram)
        self._phases: defaultdict[str, _Histogram] = defaultdict(_Histogram)

    def observe(self, method: str, code: str, seconds: float, phases: Mapping[str, float]) -> None:
        with self._lock:
            self._calls[method, code].observe(seconds)
            for phase, spent in phases.items():
                self._phases[phase].observe(spent)

    def counts(self) -> dict[tuple[str, str], int]:
        with self._lock:
            return {key: sum(histogram.counts) for key, histogram in self._calls.items()}

    def collect(self) -> Iterator[HistogramMetricFamily]:
        text = "Time from a call's arrival to its answer, by method and gRPC status."
        calls = HistogramMetricFamily("equiserve_call_seconds", text, labels=["code", "method"])
        text = "Time in each phase of a GetAction: decode, queue, inference, safety, encode."
        phases = HistogramMetricFamily("equiserve_phase_seconds", text, labels=["phase"])
        with self._lock:
            for (method, code), histogram in self._calls.items():
                histogram.add_to(calls, [code, method])
            for phase, histogram in self._phases.items():
                histogram.add_to(phases, [phase])
        yield calls
        yield phases
