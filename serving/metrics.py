"""What the server counts and times, for Prometheus."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Histogram, start_http_server

from serving.errors import StartupError

# 0.1 ms to 10 s: a small policy answers in one millisecond, a paper-size one on a loaded machine in a hundred.
BUCKETS_S = (*(base * scale for scale in (1e-4, 1e-3, 1e-2, 1e-1, 1.0) for base in (1, 2, 5)), 10.0)


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
        self._calls = Histogram(
            "equiserve_call_seconds",
            "Time from a call's arrival to its answer, by method and gRPC status.",
            ["method", "code"],
            registry=self.registry,
            buckets=BUCKETS_S,
        )
        self._phases = Histogram(
            "equiserve_phase_seconds",
            "Time in each phase of a call: queue, decode, inference, safety, encode.",
            ["method", "phase"],
            registry=self.registry,
            buckets=BUCKETS_S,
        )

    def record(self, method: str, code: str, seconds: float, phases: Phases) -> None:
        self._calls.labels(method, code).observe(seconds)
        for phase, spent in phases.seconds.items():
            self._phases.labels(method, phase).observe(spent)

    def expose(self, port: int) -> int:
        """Serve /metrics on the loopback interface; the port in use (0 asks for a free one)."""
        try:
            server, _ = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except OSError as error:
            raise StartupError(f"cannot serve metrics on 127.0.0.1:{port}: {error.strerror}") from error
        return server.server_port
