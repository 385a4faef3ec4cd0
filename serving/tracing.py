"""OpenTelemetry spans, where they are wanted: one a call, with its phases. What exports them is OpenTelemetry's own."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from serving.errors import StartupError
from serving.metrics import Phases

log = logging.getLogger(__name__)

START = "start by `opentelemetry-instrument python -m serving.server`, where OTEL_* say where the spans go"

FLUSH_MS = 1000
"""How long an end may take for the last spans to be sent."""


class Span:
    """Nothing, where tracing is off."""

    def end(self, phases: Phases, code: str) -> None:
        """What is known of a call when it has its status."""


class Tracer:
    """Makes no spans."""

    def span(self, method: str, request_id: str) -> AbstractContextManager[Span]:
        return _NOTHING

    def flush(self) -> None:
        """Send what waits to be."""


_NOTHING = nullcontext(Span())


class OpenTelemetry(Tracer):
    """Makes spans with whatever provider the process has (opentelemetry-instrument sets one up from OTEL_*).

    Raises:
        StartupError: when opentelemetry is not installed.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import trace
        except ImportError as error:
            install = "pip install opentelemetry-distro opentelemetry-exporter-otlp"
            raise StartupError(f"--trace needs OpenTelemetry: {install}, and {START}") from error
        self._tracer = trace.get_tracer("equiserve", tracer_provider=provider)
        self._provider = provider or trace.get_tracer_provider()
        if isinstance(self._provider, trace.ProxyTracerProvider):
            log.warning("--trace: OpenTelemetry has not been set up, and nothing is traced: %s", START)

    @contextmanager
    def span(self, method: str, request_id: str) -> Iterator[Span]:
        with self._tracer.start_as_current_span(method, attributes={"request_id": request_id}) as span:
            yield _Recording(span)

    def flush(self) -> None:
        if force := getattr(self._provider, "force_flush", None):  # the SDK's has one, the API's has none
            force(FLUSH_MS)


class _Recording(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, phases: Phases, code: str) -> None:
        self._span.set_attribute("rpc.grpc.status", code)
        for name, seconds in phases.seconds.items():
            self._span.set_attribute(f"{name}_ms", seconds * 1e3)
