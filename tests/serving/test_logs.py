"""What a caller sends can neither end a log line nor forge a field; traces tell where a call's time went."""

import io
import json
import logging
import sys

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from protos.equiserve.v1 import policy_pb2 as pb
from serving import logs
from serving.errors import StartupError
from serving.logs import Throttle
from serving.tracing import OpenTelemetry
from tests.serving.requests import acting

HOSTILE = (
    "x\n2026-01-01 INFO serving.server: admin loaded evil",
    'x", "level": "CRITICAL", "y": "',
    "x\r\nINFO",
    "\x1b[31mred\x1b[0m",
    "x\u2028next\u0085line\u2029",
    "%s%n%d{}",
    "x" * 5000,
)


@pytest.fixture(params=["text", "json"])
def lines(request, monkeypatch):
    """A function that returns what has been logged so far, and the style."""
    stream, root = io.StringIO(), logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(request.param)
    yield request.param, lambda: stream.getvalue()
    root.handlers[:] = before
    root.setLevel(level)


def test_a_refusal_is_found_by_its_request_id(running, lines):
    _, logged = lines
    with pytest.raises(grpc.RpcError):
        running.stub.GetAction(acting(1, policy="nobody"), metadata=[("x-request-id", "arm-7:1")])
    (line,) = [line for line in logged().splitlines() if "arm-7:1" in line]
    assert "nobody" in line


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: ascii(text)[:20])
def test_no_caller_forges_a_line(running, lines, hostile, monkeypatch):
    style, logged = lines
    monkeypatch.setattr(running.server.answering, "_throttle", Throttle(per_second=10**6))
    asked = [acting(1, policy=hostile), acting(1, episode_id=hostile), acting(1, contract_digest=hostile)]
    for request in asked:
        with pytest.raises(grpc.RpcError):
            running.stub.GetAction(request)
    written = logged().split("\n")[:-1]
    assert len(written) == len(asked)
    assert all(line.isprintable() and line.isascii() and len(line) < 1500 for line in written)
    if style == "json":
        assert [json.loads(line)["level"] for line in written] == ["INFO"] * len(asked)
        assert all(
            set(json.loads(line)) == {"time", "level", "logger", "message", "request_id", "client", "field"}
            for line in written
        )
    else:
        assert all(line.startswith("20") and " INFO serving.answering: GetAction refused" in line for line in written)


def test_a_message_of_our_own_is_one_line_too(lines):
    _, logged = lines
    logging.getLogger("serving.test").info("first\nsecond %s", "\x1b[0m")
    assert len(logged().split("\n")) == 2


def test_a_flood_of_refusals_is_counted_and_not_written():
    throttle = Throttle(per_second=5)
    allowed = sum(throttle.allows() for _ in range(1000))
    assert 5 <= allowed <= 10  # a second may have passed
    assert throttle.left_out() == 1000 - allowed
    assert throttle.left_out() == 0


def test_a_call_is_a_span_with_its_phases_and_status(serve, healthy):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    running = serve(policy=(str(healthy),))
    running.server.answering.tracer = OpenTelemetry(provider)
    answer = running.stub.GetAction(acting(1))
    with pytest.raises(grpc.RpcError):
        running.stub.GetAction(pb.GetActionRequest())
    good, bad = exporter.get_finished_spans()
    assert (good.name, good.attributes["rpc.grpc.status"]) == ("GetAction", "OK")
    assert good.attributes["request_id"] == answer.request_id
    assert {f"{name}_ms" for name in ("decode", "queue", "inference", "safety", "encode")} <= set(good.attributes)
    assert good.attributes["inference_ms"] > 0
    assert bad.attributes["rpc.grpc.status"] == "INVALID_ARGUMENT"
    exporter.clear()
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
    running.stub.GetAction(acting(1))
    assert len(exporter.get_finished_spans()) == 1  # of the one that does not gather
    running.server.stop()
    assert len(exporter.get_finished_spans()) == 2


def test_traces_that_go_nowhere_are_told(caplog):
    OpenTelemetry(TracerProvider())
    assert not caplog.messages
    OpenTelemetry()
    assert "nothing is traced: start by `opentelemetry-instrument python -m serving.server`" in caplog.text


def test_traces_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(StartupError, match=r"pip install opentelemetry-distro .* start by `opentelemetry-instrument"):
        OpenTelemetry()
