"""Who there is no room for is refused before anything else is done for him."""

import threading
from collections import Counter

import grpc
import pytest

from protos.equiserve.v1 import policy_pb2 as pb
from tests.serving.load import connect
from tests.serving.requests import acting, refusal

METHODS = ("GetAction", "GetActionBatch")


def by_stream(channel, method):
    """The method, with its one message in the sender's hands: it may come late, twice or never."""
    return channel.stream_unary(
        f"/equiserve.v1.PolicyService/{method}", request_serializer=lambda m: m.SerializeToString()
    )


@pytest.fixture
def full(serve, healthy, monkeypatch):
    """A server whose only place and whose only chair are taken until `go` is set."""
    running, go, entered = serve(policy=(str(healthy),), concurrency=1, queue=1), threading.Event(), threading.Event()
    run = running.sessions["tiny"].run

    def held(*args):
        entered.set()
        return (go.wait(20), run(*args))[1]

    monkeypatch.setattr(running.sessions["tiny"], "run", held)
    with connect(running.server.address) as one, connect(running.server.address) as other:
        calls = []
        for channel in (one, other):
            calls.append(channel.unary_unary("/equiserve.v1.PolicyService/GetAction").future(
                acting(1).SerializeToString(), timeout=20
            ))  # fmt: skip
            entered.wait(10)
        while not running.server.dispatcher.waiting:
            pass
        yield running
        go.set()
        assert all(call.exception(20) is None for call in calls)


@pytest.mark.parametrize("method", METHODS)
def test_a_refusal_does_not_wait_for_the_message(full, method):
    never = threading.Event()
    with pytest.raises(grpc.RpcError) as refused, connect(full.server.address) as channel:
        by_stream(channel, method)((acting(1) for _ in range(1) if never.wait(10)), timeout=5)
    never.set()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_refusal_at_the_door_says_what_it_expected_and_is_counted(full):
    code, told = refusal(full.stub.GetAction, acting(1))
    assert (code, told["field"]) == ("RESOURCE_EXHAUSTED", "server")
    assert "waiting calls" in told["expected"]
    counts = Counter({(c.method, c.code): c.count for c in full.stub.GetStats(pb.GetStatsRequest()).calls})
    assert counts["GetAction", "RESOURCE_EXHAUSTED"] == 1


def test_who_drains_says_so_though_it_is_full(full):
    full.server.answering.draining = True
    assert refusal(full.stub.GetAction, acting(1))[0] == "UNAVAILABLE"


@pytest.mark.parametrize("method", METHODS)
def test_a_call_without_a_message_is_the_callers_mistake(serve, healthy, method):
    running = serve(policy=(str(healthy),))
    with pytest.raises(grpc.RpcError) as refused:
        by_stream(running.channel, method)(iter(()), timeout=5)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "one message" in refused.value.details()


def test_of_two_messages_the_first_counts(serve, healthy):
    running = serve(policy=(str(healthy),))
    answer = by_stream(running.channel, "GetAction")(iter([acting(1), acting(2)]), timeout=5)
    alone = running.stub.GetAction(acting(1))
    assert pb.GetActionResponse.FromString(answer).raw_action == alone.raw_action
