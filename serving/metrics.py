"""What the server counts and times, for Prometheus and for GetStats."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from serving.errors import StartupError

# 0.1 ms to 10 s: a small policy answers in one millisecond, a paper-size one on a loaded machine in a hundred.
BUCKETS_S = (*(base * scale for scale in (1e-4, 1e-3, 1e-2, 1e-1, 1.0) for base in (1, 2, 5)), 10.0)
PHASES = ("decode", "queue", "inference", "safety", "encode")
RECENT = 4096
"""Calls that GetStats' quantiles speak of."""


class Phases:
    """Where one call's time goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start

    def us(self, name: str) -> int:
        return round(self.seconds.get(name, 0.0) * 1e6)


class Metrics:
    """Own registry, so that several servers can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._started = time.monotonic()
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in ("call", *PHASES)}
        self._call = Histogram(
            "equiserve_call_seconds",
            "Time from a call's arrival to its answer, by method and gRPC status.",
            ["method", "code"],
            registry=self.registry,
            buckets=BUCKETS_S,
        )
        self._phase = Histogram(
            "equiserve_phase_seconds",
            "Time in each phase of a GetAction: decode, queue, inference, safety, encode.",
            ["phase"],
            registry=self.registry,
            buckets=BUCKETS_S,
        )
        self._interventions = self._counter("interventions", "Changes by the safety envelope.", "field", "rule")
        self._holds = self._counter("holds", "Answers that were to stay, because the policy's was no action.", "policy")
        self._warnings = self._counter("frame_warnings", "Frames that were suspicious.")
        self._reloads = self._counter("policy_loads", "Policies that were to be loaded, by result.", "result")
        self._proofs = Gauge(
            "equiserve_proof_error",
            "What a live policy's proof measured at load; beside it the bound.",
            ["policy", "version", "proof", "what"],
            registry=self.registry,
        )

    def record(self, method: str, code: str, seconds: float, phases: Phases) -> None:
        """One call, once its status is known."""
        self._call.labels(method, code).observe(seconds)
        if code == "OK" and method == "GetAction":
            self._recent["call"].append(seconds)
        for phase, spent in phases.seconds.items():
            self._phase.labels(phase).observe(spent)
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

    def proved(self, policy: str, version: str, proof: str, measured: float, bound: float) -> None:
        self._proofs.labels(policy, version, proof, "measured").set(measured)
        self._proofs.labels(policy, version, proof, "bound").set(bound)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(f"equiserve_{name}", text, registry=self.registry).set_function(read)

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started

    def call_counts(self) -> dict[tuple[str, str], int]:
        """Calls that ended, by (method, code)."""
        return _counts(self._call, "equiserve_call_seconds_count", "method", "code")

    def intervention_counts(self) -> dict[tuple[str, str], int]:
        """Changes by the envelope, by (field, rule)."""
        return _counts(self._interventions, "equiserve_interventions_total", "field", "rule")

    def quantiles_ms(self) -> dict[str, tuple[float, float, float, float, int]]:
        """p50, p95, p99, maximum and number of the recent answers, by phase and for the whole call."""
        found = {}
        for name, recent in self._recent.items():
            seconds = np.array(recent.copy())
            if len(seconds):
                p50, p95, p99 = np.percentile(seconds, (50, 95, 99)) * 1e3
                found[name] = float(p50), float(p95), float(p99), float(seconds.max()) * 1e3, len(seconds)
        return found

    def expose(self, port: int) -> int:
        """Serve /metrics on the loopback interface; the port in use (0 asks for a free one)."""
        try:
            server, _ = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except OSError as error:
            raise StartupError(f"cannot serve metrics on 127.0.0.1:{port}: {error.strerror}") from error
        return server.server_port

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"equiserve_{name}", text, labels, registry=self.registry)


def _counts(metric: Counter | Histogram, name: str, first: str, second: str) -> dict[tuple[str, str], int]:
    samples = [s for family in metric.collect() for s in family.samples if s.name == name]
    return {(s.labels[first], s.labels[second]): int(s.value) for s in samples}
