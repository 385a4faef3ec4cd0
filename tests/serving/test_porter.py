"""Who there is no room for is refused before anything else is done for him."""

import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.errors import RETRY, Rejected, Status
from serving.porter import AWAITED
from serving.security import new_token
from serving.server import OTHER_THREADS, THREADS
from tests.serving.load import connect
from tests.serving.requests import acting, refusal
from tests.serving.test_dispatcher import until

METHODS = ("GetAction", "GetActionBatch")


def by_stream(channel, method):
    """The method, with its one message in the sender's hands: it may come late, twice or never."""
    path = method if method.startswith("/") else f"/equiserve.v1.PolicyService/{method}"
    return channel.stream_unary(path, request_serializer=lambda m: m.SerializeToString())


def ask(channel):
    return channel.unary_unary("/equiserve.v1.PolicyService/GetAction").future(
        acting(1).SerializeToString(), timeout=20
    )  # fmt: skip


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
        calls = [ask(one)]
        assert entered.wait(10)
        calls.append(ask(other))
        until(lambda: running.server.dispatcher.waiting)
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


@pytest.fixture
def patient(monkeypatch):
    """Nobody is cancelled within a test, however busy the machine."""
    for bound in ("MESSAGE_S", "QUESTION_S", "CROWDED_S"):
        monkeypatch.setattr(f"serving.porter.{bound}", 60.0)


@pytest.mark.parametrize("method", ["GetAction", "GetStats", "/grpc.health.v1.Health/Check"])
def test_who_never_sends_a_message_does_not_take_all_threads(serve, healthy, patient, method):
    """Of the calls that one client leaves without a message, a few are kept waiting, and the others refused."""
    running, never = serve(policy=(str(healthy),)), threading.Event()

    def without_message():
        return by_stream(idle, method).future((acting(1) for _ in range(1) if never.wait(20)), timeout=20)

    with connect(running.server.address) as idle:
        calls = [without_message() for _ in range(THREADS + 8)]
        until(lambda: sum(call.done() for call in calls) >= THREADS)
        refused = [call for call in calls if call.done()]
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert "message has not come" in refused[0].details()
        assert running.stub.GetAction(acting(1), timeout=5).version
        assert health_pb2_grpc.HealthStub(running.channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status
        for call in calls:
            call.cancel()
        never.set()
        until(lambda: by_stream(idle, "GetAction").future(iter([acting(1)]), timeout=5).code() is grpc.StatusCode.OK)


REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.mark.parametrize("method", ["/grpc.health.v1.Health/Watch", REFLECT])
def test_streams_that_stay_open_take_no_thread_from_who_acts(serve, healthy, patient, method):
    """More of them than threads, by several connections."""
    running, never = serve(policy=(str(healthy),)), threading.Event()
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(running.server.address)) for _ in range(2 * THREADS // AWAITED)]
        calls = [
            one.stream_stream(method)(b"" for _ in range(1) if never.wait(20)) for one in idle for _ in range(AWAITED)
        ]
        time.sleep(0.5)
        assert not any(call.done() for call in calls)
        assert running.stub.GetAction(acting(1), timeout=5).version
        assert health_pb2_grpc.HealthStub(running.channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status
        for call in calls:
            call.cancel()
        never.set()


WATCH, CHECK = (f"/grpc.health.v1.Health/{method}" for method in ("Watch", "Check"))


@pytest.mark.parametrize("method", [WATCH, REFLECT, CHECK, "GetAction"])
def test_whose_message_does_not_come_is_cancelled_and_all_others_are_answered(serve, healthy, monkeypatch, method):
    """More of them than threads, by several connections: nobody would be answered as long as they stay."""
    for bound in ("MESSAGE_S", "QUESTION_S"):
        monkeypatch.setattr(f"serving.porter.{bound}", 0.4)
    running, never = serve(policy=(str(healthy),)), threading.Event()
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(running.server.address)) for _ in range(5)]
        calls = [
            by_stream(one, method).future((b"" for _ in range(1) if never.wait(20)), timeout=20)
            for one in idle
            for _ in range(8)
        ]
        health = health_pb2_grpc.HealthStub(running.channel)
        assert running.stub.GetAction(acting(1), timeout=10).version
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status
        assert next(health.Watch(health_pb2.HealthCheckRequest(), timeout=10)).status
        until(lambda: all(call.done() for call in calls))
        never.set()
    assert {call.code() for call in calls} == {grpc.StatusCode.CANCELLED}
    until(lambda: not running.server._porter._due)


def test_where_many_messages_do_not_come_nobody_waits_long_for_one(serve, healthy, monkeypatch):
    """A link may be slow; but a few connections together could take all threads for a quarter of a minute."""
    for bound, seconds in (("MESSAGE_S", 60.0), ("QUESTION_S", 20.0), ("CROWDED_S", 0.4)):
        monkeypatch.setattr(f"serving.porter.{bound}", seconds)
    running, never = serve(policy=(str(healthy),)), threading.Event()

    def without_message(one):
        return by_stream(one, "GetAction").future((acting(1) for _ in range(1) if never.wait(20)), timeout=20)

    with ExitStack() as stack:
        idle = [stack.enter_context(connect(running.server.address)) for _ in range(THREADS // 2 // AWAITED)]
        calls = [without_message(one) for one in idle for _ in range(AWAITED - 1)]
        streams = [stack.enter_context(connect(running.server.address)) for _ in range(OTHER_THREADS // AWAITED)]
        asking = [one.stream_stream(REFLECT)(b"" for _ in range(1) if never.wait(20)) for one in streams * AWAITED]
        time.sleep(2.0)
        assert not any(call.done() for call in asking)  # they take no robots' thread
        assert not any(call.done() for call in calls)
        calls += map(without_message, idle)
        until(lambda: all(call.done() for call in calls))
        assert not any(call.done() for call in asking)
        never.set()
    assert {call.code() for call in calls} == {grpc.StatusCode.CANCELLED}


def test_a_second_try_gets_its_answer_though_there_is_no_room(serve, healthy, monkeypatch):
    running = serve(policy=(str(healthy),), concurrency=1, queue=1)
    episode = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    step = acting(1, episode_id=episode, step=1)
    first, runs = running.stub.GetAction(step), running.runs

    def no_room(*_call):
        raise Rejected("server", "room", "none", "later", Status.RESOURCE_EXHAUSTED)

    with monkeypatch.context() as full:
        full.setattr(running.server.dispatcher, "_require_room", no_room)
        assert refusal(running.stub.GetAction, step)[0] == "RESOURCE_EXHAUSTED"
        assert running.stub.GetAction(step, metadata=((RETRY, "1"),)) == first
        new = acting(2, episode_id=episode, step=2)
        assert refusal(running.stub.GetAction, new, metadata=((RETRY, "1"),))[0] == "RESOURCE_EXHAUSTED"
        assert running.runs == runs
    assert running.stub.GetAction(new).version == first.version


def test_a_call_that_ends_before_its_message_is_nobodys_mistake(serve, healthy):
    """The caller saw CANCELLED or DEADLINE_EXCEEDED: the counts must not say INVALID_ARGUMENT."""
    running, never = serve(policy=(str(healthy),)), threading.Event()
    for _ in range(30):
        with pytest.raises(grpc.RpcError):
            by_stream(running.channel, "GetAction")((acting(1) for _ in range(1) if never.wait(10)), timeout=0.02)
    never.set()
    running.stub.GetAction(acting(1))
    counts = Counter({(c.method, c.code): c.count for c in running.stub.GetStats(pb.GetStatsRequest()).calls})
    assert counts == {("GetAction", "OK"): 1}


@contextmanager
def acting_meanwhile(address, token=()):
    """Somebody who acts ten times a second."""
    over = threading.Event()

    def act():
        with connect(address) as channel:
            while not over.wait(0.1):
                pb_grpc.PolicyServiceStub(channel).GetAction(acting(1), timeout=10, metadata=token)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def refused_for_their_rate(channel, token=(), calls=30):
    """How many of so many questions, one after the other."""
    stats, refused = channel.unary_unary("/equiserve.v1.PolicyService/GetStats"), 0
    for _ in range(calls):
        try:
            stats(b"", timeout=20, metadata=token)
        except grpc.RpcError as error:
            refused += "such calls a second" in error.details()
    return refused


def test_questions_are_held_to_a_rate_beside_who_acts(serve, healthy):
    running = serve(policy=(str(healthy),), client_hz=5.0)
    assert not refused_for_their_rate(running.channel)
    with acting_meanwhile(running.server.address):
        until(lambda: running.runs)
        assert refused_for_their_rate(running.channel) > 10


@pytest.mark.parametrize("method", ["EndEpisode", "Drain"])
def test_what_ends_something_is_never_asked_too_often(serve, healthy, tmp_path, method):
    operator, arm = (
        [("authorization", f"Bearer {new_token(role, (role,), tmp_path / 'tokens')}")] for role in ("admin", "act")
    )
    running = serve(policy=(str(healthy),), client_hz=5.0, tokens=tmp_path / "tokens")
    started = running.stub.StartEpisode(pb.StartEpisodeRequest(), metadata=operator).episode_id
    with acting_meanwhile(running.server.address, arm):
        until(lambda: running.runs)
        assert refused_for_their_rate(running.channel, operator) > 10
        if method == "EndEpisode":
            running.stub.EndEpisode(pb.EndEpisodeRequest(episode_id=started), metadata=operator)
        else:
            pb_grpc.PolicyAdminStub(running.channel).Drain(pb.DrainRequest(), metadata=operator)


def test_streams_whose_messages_do_not_come_hold_up_nobody_else(serve, healthy):
    """Not of one connection, not of many, and not by calls that are left as soon as they are made."""
    running = serve(policy=(str(healthy),))
    watch = "/grpc.health.v1.Health/Watch"
    with ExitStack() as stack:
        go = threading.Event()
        stack.callback(go.set)

        def never():
            go.wait(20)
            yield from ()

        for _ in range(4):
            channel = stack.enter_context(connect(running.server.address))
            for _ in range(40):
                channel.stream_stream(watch)(never(), timeout=20)
            for _ in range(40):
                channel.stream_stream(watch)(never(), timeout=20).cancel()
        other = stack.enter_context(connect(running.server.address))
        stub, asked = health_pb2_grpc.HealthStub(other), health_pb2.HealthCheckRequest()
        for number in range(20):
            assert stub.Check(asked, timeout=5).status == health_pb2.HealthCheckResponse.SERVING
            pb_grpc.PolicyServiceStub(other).GetAction(acting(number), timeout=5)


@pytest.mark.parametrize(
    "method", ["/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
)
def test_bytes_that_are_no_message_are_refused_where_streams_are_asked_for_too(running, caplog, method):
    with pytest.raises(grpc.RpcError) as refused:
        list(running.channel.stream_stream(method)(iter([b"\xff"]), timeout=20))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in caplog.text


def test_what_fails_at_the_door_is_told_to_the_log_alone(serve, healthy, monkeypatch):
    running = serve(policy=(str(healthy),))

    def broken(_name, **_how):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(running.server.dispatcher, "admit", broken)
    code, told = refusal(running.stub.GetAction, acting(1))
    assert code == "INTERNAL"
    assert "secret" not in str(told)
