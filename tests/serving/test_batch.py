"""GetActionBatch: many observations, each with its own status, and the same answers as one by one."""

import weakref

import numpy as np
import pytest

from protos.codec import unpack_action
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status
from protos.spaces import ACTION
from tests.makers import tiny_policy_file
from tests.serving.requests import acting, refusal
from tests.serving.test_dispatcher import until


def test_a_batch_is_its_items_one_by_one(running):
    requests = [acting(i) for i in range(20)]
    items = running.stub.GetActionBatch(pb.GetActionBatchRequest(requests=requests)).items
    assert [item.status.code for item in items] == [0] * 20
    for request, item in zip(requests, items, strict=True):
        alone = running.stub.GetAction(request)
        np.testing.assert_allclose(
            unpack_action(item.response.action, ACTION), unpack_action(alone.action, ACTION), atol=1e-6
        )
        assert (item.response.policy, item.response.version) == (alone.policy, alone.version)


def test_each_item_has_its_own_status(running):
    requests = [
        acting(1),
        pb.GetActionRequest(),
        acting(2, policy="other"),
        acting(3, episode_id="e"),
        acting(4, step=4),
        acting(5, age_us=10**9),
        acting(6, mode=9),
        acting(7),
        acting(8, applied_step=0),
    ]
    items = running.stub.GetActionBatch(pb.GetActionBatchRequest(requests=requests)).items
    assert [item.status.code for item in items] == [0, 3, 5, 3, 3, 11, 3, 0, 3]
    assert items[2].status.message.startswith("policy: expected one of")
    assert not items[1].HasField("response")
    assert items[7].response.policy == "tiny"


def test_a_batch_may_ask_several_policies(serve, healthy, tmp_path):
    other = tiny_policy_file(tmp_path / "other.onnx", weight=2.0)
    running = serve(policy=(f"a={healthy}", f"b={other}"))
    requests = [acting(i, policy="ab"[i % 2]) for i in range(6)]
    items = running.stub.GetActionBatch(pb.GetActionBatchRequest(requests=requests)).items
    assert [item.response.policy for item in items] == ["a", "b"] * 3
    assert items[0].response.action != running.stub.GetAction(acting(0, policy="b")).action
    assert sum(session.runs for session in running.sessions.values()) == 3


def test_others_get_their_turn_within_a_batch(serve, healthy, monkeypatch):
    """And what there is no room for by then says so itself."""
    running = serve(policy=(f"tiny={healthy}",))
    sizes, act = [], running.server.dispatcher.act

    def counted(policy, observations, caller):
        sizes.append(len(observations))
        if len(sizes) == 2:
            raise Rejected("server", "room", "none", "send less often", Status.RESOURCE_EXHAUSTED)
        return act(policy, observations, caller)

    monkeypatch.setattr(running.server.dispatcher, "act", counted)
    requests = [acting(i) for i in range(20)]
    items = running.stub.GetActionBatch(pb.GetActionBatchRequest(requests=requests)).items
    assert sizes == [8, 8, 4]
    assert [item.status.code for item in items] == [0] * 8 + [8] * 8 + [0] * 4


def test_the_dispatcher_is_told_when_an_answer_is_out_and_waits_for_no_part_of_a_batch(serve, healthy):
    running = serve(policy=(str(healthy),))
    running.stub.GetAction(acting(1))
    ((_, replied),) = running.server.dispatcher._answered
    assert replied.wait(5)
    running.stub.GetActionBatch(pb.GetActionBatchRequest(requests=[acting(i) for i in range(3)]))
    ((_, replied),) = running.server.dispatcher._answered
    assert replied is None


def test_nothing_of_a_call_is_kept_once_it_is_over(serve, healthy, monkeypatch):
    """Neither its message nor gRPC's part of it: the next call would have to wait while it is freed."""
    running = serve(policy=(str(healthy),))
    contexts, made = [], running.server.answering._call

    def noticed(context):
        contexts.append(weakref.ref(context))
        return made(context)

    monkeypatch.setattr(running.server.answering, "_call", noticed)
    running.stub.GetAction(acting(1))
    until(lambda: contexts[0]() is None)


def test_a_batch_counts_whole_in_however_small_parts(serve, healthy, monkeypatch):
    """In parts of one, which is what beside a robot it comes in, it would count as one call, and get more."""
    running = serve(policy=(f"tiny={healthy}",))
    dispatcher = running.server.dispatcher
    monkeypatch.setattr(dispatcher, "part", lambda name, most: 1)
    requests = [acting(i) for i in range(20)]
    running.stub.GetActionBatch(pb.GetActionBatchRequest(requests=requests))
    (client,) = dispatcher._rhythm._clients.values()
    assert client.asks.events > 10


def test_a_deadline_is_the_whole_calls(serve, healthy, monkeypatch):
    running = serve(policy=(f"tiny={healthy}",))

    def late(policy, observations, caller):
        raise Rejected("deadline", "time left", "none", "allow more", Status.DEADLINE_EXCEEDED)

    monkeypatch.setattr(running.server.dispatcher, "act", late)
    request = pb.GetActionBatchRequest(requests=[acting(1)])
    assert refusal(running.stub.GetActionBatch, request)[0] == "DEADLINE_EXCEEDED"
    assert running.server.metrics.call_counts()["GetActionBatch", "DEADLINE_EXCEEDED"] == 1


@pytest.mark.parametrize("count", [0, 257, 2_000_000])
def test_a_batch_has_a_size(running, count):
    requests = pb.GetActionBatchRequest(requests=[pb.GetActionRequest()] * count)
    code, parts = refusal(running.stub.GetActionBatch, requests)
    assert (code, parts["field"], parts["expected"]) == ("INVALID_ARGUMENT", "requests", "1 to 256 items")
