"""The line before the model: bounded, fair, in order, and nobody computes for those who left."""

import contextlib
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from protos.errors import Rejected, Status
from serving.dispatcher import Dispatcher
from serving.policy import Proposal
from serving.rhythm import OFTEN_MISSED
from serving.turn import Caller


class Model:
    """Stands for a policy: answers with what it is asked, when it is allowed to."""

    def __init__(self):
        self.go, self.runs, self.lock = threading.Semaphore(0), [], threading.Lock()

    def act_many(self, observations):
        with self.lock:
            self.runs.append(list(observations))
        assert self.go.acquire(timeout=10)
        if "fail" in observations:
            raise RuntimeError("the model failed")
        return [Proposal(o, o, None) for o in observations]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def caller(name="a", within_s=math.inf, alive=lambda: True, replied=None):
    return Caller(name, time.monotonic() + within_s, alive, replied)


def until(condition, within_s=5.0):
    for _ in range(int(within_s * 100)):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def ask(pool, dispatcher, model, observation, who=None):
    """Ask in a thread, and return when it stands in its place."""
    before = dispatcher.running + dispatcher.waiting
    future = pool.submit(dispatcher.act, model, [observation], who or caller(observation))
    until(lambda: future.done() or dispatcher.running + dispatcher.waiting > before)
    return future


def test_as_many_run_as_may_and_the_rest_wait_in_order(pool, model):
    dispatcher = Dispatcher(concurrency=2, queue=4)
    calls = [ask(pool, dispatcher, model, name) for name in "abcdef"]
    assert (dispatcher.running, dispatcher.waiting) == (2, 4)
    for done in range(1, len(calls) + 1):
        model.go.release()
        until(lambda done=done: sum(c.done() for c in calls) == done)
        until(lambda done=done: len(model.runs) == min(done + 2, len(calls)))
    assert [call.result(5).proposals[0].action for call in calls] == list("abcdef")
    assert {run[0] for run in model.runs[:2]} == {"a", "b"}
    assert [run[0] for run in model.runs[2:]] == list("cdef")
    assert (dispatcher.running, dispatcher.waiting) == (0, 0)


def test_a_lone_client_may_have_all_places_and_beside_another_it_may_not(pool, model, monkeypatch):
    monkeypatch.setattr("serving.rhythm.WINDOW_S", 60.0)  # however busy the machine
    dispatcher = Dispatcher(concurrency=2, queue=4)

    def twice_a():
        for _ in range(2):
            dispatcher.admit("a")
        calls = [ask(pool, dispatcher, model, "a") for _ in range(2)]
        places = dispatcher.running
        for _ in calls:
            model.go.release()
        assert all(call.result(5) for call in calls)
        return places

    assert twice_a() == 2
    dispatcher.admit("b")
    assert twice_a() == 1


def test_beyond_the_line_is_refused_at_once(pool, model):
    dispatcher = Dispatcher(concurrency=1, queue=2)
    calls = [ask(pool, dispatcher, model, name) for name in "abc"]
    with pytest.raises(Rejected, match=r"at most 2 waiting calls?, got 3") as refused:
        dispatcher.act(model, ["d"], caller("d"))
    assert refused.value.status is Status.RESOURCE_EXHAUSTED
    for _ in calls:
        model.go.release()
    assert [call.result(5).proposals[0].action for call in calls] == list("abc")


def test_a_slow_models_line_is_shorter_but_never_nothing(pool, model):
    dispatcher = Dispatcher(concurrency=1, queue=3, max_wait_s=0.05)
    unknown = [ask(pool, dispatcher, model, name) for name in "abcd"]
    time.sleep(0.2)
    model.go.release(4)  # the first took 0.2 s
    assert all(call.result(5) for call in unknown)
    calls = [ask(pool, dispatcher, model, name) for name in "ef"]
    with pytest.raises(Rejected, match=r"at most 1 waiting calls?, got 2"):
        dispatcher.act(model, ["g"], caller("g"))
    model.go.release(2)
    assert all(call.result(5) for call in calls)


def test_one_client_can_take_neither_all_places_nor_all_of_the_line(pool, model):
    dispatcher = Dispatcher(concurrency=2, queue=2)
    flood = [ask(pool, dispatcher, model, i, caller("flood")) for i in range(2)]
    assert (dispatcher.running, dispatcher.waiting) == (1, 1)
    with pytest.raises(Rejected, match="of one client"):
        dispatcher.act(model, [9], caller("flood"))
    robot = ask(pool, dispatcher, model, "robot")
    assert dispatcher.running == 2
    for _ in range(3):
        model.go.release()
    assert robot.result(5).proposals[0].action == "robot"
    assert all(call.result(5) for call in flood)


@pytest.fixture
def clock(monkeypatch):
    """The dispatcher's time, which goes on when a test says so."""
    clock = SimpleNamespace(now=time.monotonic())
    held = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    for module in ("serving.dispatcher", "serving.turn"):
        monkeypatch.setattr(f"{module}.time", held)
    return clock


def test_the_last_place_in_the_line_is_kept_for_who_asks_less(pool, model, clock):
    dispatcher = Dispatcher(concurrency=1, queue=1, client_hz=60)
    for _ in range(100):
        dispatcher.admit("flood")
    first = ask(pool, dispatcher, model, "first", caller("flood"))
    alone = ask(pool, dispatcher, model, "second", caller("flood"))
    model.go.release(2)
    assert first.result(5)
    assert alone.result(5)
    for _ in range(4):
        clock.now += 0.1
        dispatcher.admit("robot")
    clock.now += 0.05  # its next call is not due yet
    first = ask(pool, dispatcher, model, "third", caller("flood"))
    with pytest.raises(Rejected, match="of one client"):
        dispatcher.act(model, ["fourth"], caller("flood"))
    robot = ask(pool, dispatcher, model, "robot")
    assert (dispatcher.running, dispatcher.waiting) == (1, 1)
    model.go.release(2)
    assert first.result(5)
    assert robot.result(5)


@pytest.fixture
def flooded(clock):
    """One client has asked very often, and another as a controller does."""
    dispatcher = Dispatcher(concurrency=1, queue=4, client_hz=60)
    for _ in range(200):
        dispatcher.admit("flood")
    for _ in range(4):
        clock.now += 0.1
        dispatcher.admit("robot")
    return dispatcher


def test_a_flood_is_not_let_in_while_a_controllers_call_is_before_the_model(flooded, pool, model):
    """To read its message would take from that inference's time."""
    robot = ask(pool, flooded, model, "robot", caller("robot"))
    with pytest.raises(Rejected, match="fair share"):
        flooded.admit("flood")
    flooded.admit("another robot")
    model.go.release()
    assert robot.result(5)
    flooded.admit("flood")


def test_a_controller_is_let_in_after_all_where_another_is_always_before_the_model(pool, model, clock):
    """Both act within a controller's rate, and an inference takes 45 ms: each asks for more than its share."""
    dispatcher = Dispatcher(concurrency=1, queue=4, client_hz=60)
    dispatcher._rhythm.took(0.045)
    for i in range(150):
        clock.now += 0.02
        for name in ("fast",) if i % 3 else ("fast", "robot"):
            dispatcher._rhythm.asks(name, clock.now)
    robot = ask(pool, dispatcher, model, "robot", caller("robot"))
    for _ in range(OFTEN_MISSED):
        with pytest.raises(Rejected, match="fair share"):
            dispatcher.admit("fast")
    dispatcher.admit("fast")
    model.go.release()
    assert robot.result(5)


@pytest.mark.parametrize(("name", "waits"), [("flood", True), ("another robot", False), ("robot", False)])
def test_a_floods_inference_does_not_begin_before_a_controllers_reply_is_out(
    flooded, pool, model, monkeypatch, name, waits
):
    monkeypatch.setattr("serving.dispatcher.REPLY_S", 10.0)
    replied = threading.Event()
    model.go.release(2)
    assert pool.submit(flooded.act, model, ["first"], caller("robot", replied=replied)).result(5)
    second = pool.submit(flooded.act, model, ["second"], caller(name))
    until(lambda: flooded.running or second.done())
    time.sleep(0.05)
    assert second.done() == (not waits)
    assert len(model.runs) == (1 if waits else 2)
    replied.set()
    assert second.result(5)


def test_a_reply_that_does_not_go_out_holds_nobody_up(flooded, pool, model, monkeypatch):
    monkeypatch.setattr("serving.dispatcher.REPLY_S", 0.01)
    model.go.release(2)
    for who in (caller("robot", replied=threading.Event()), caller("flood")):
        assert pool.submit(flooded.act, model, ["asks"], who).result(5)


def test_who_had_the_place_goes_behind_others(pool, model):
    dispatcher = Dispatcher(concurrency=1, queue=3)
    first, again = (ask(pool, dispatcher, model, i, caller("flood")) for i in (1, 2))
    robot = ask(pool, dispatcher, model, "robot")
    model.go.release(3)
    assert all(call.result(5) for call in (first, again, robot))
    assert model.runs == [[1], ["robot"], [2]]


def test_who_ran_out_of_time_in_the_line_never_reaches_the_model(pool, model):
    dispatcher = Dispatcher(concurrency=1, queue=4)
    first = ask(pool, dispatcher, model, "first")
    late = ask(pool, dispatcher, model, "late", caller("late", within_s=0.05))
    with pytest.raises(Rejected) as refused:
        late.result(5)
    assert refused.value.status is Status.DEADLINE_EXCEEDED
    model.go.release()
    assert first.result(5)
    with pytest.raises(Rejected):
        dispatcher.act(model, ["dead"], caller("dead", within_s=0))
    assert model.runs == [["first"]]
    assert dispatcher.expired == 2


def test_who_left_makes_room(pool, model):
    dispatcher, here = Dispatcher(concurrency=1, queue=1), {"gone": True}
    first = ask(pool, dispatcher, model, "first")
    gone = ask(pool, dispatcher, model, "gone", caller("gone", alive=lambda: here["gone"]))
    here["gone"] = False
    second = pool.submit(dispatcher.act, model, ["second"], caller("second"))
    with pytest.raises(Rejected):
        gone.result(5)
    model.go.release(2)
    assert first.result(5)
    assert second.result(5)
    assert model.runs == [["first"], ["second"]]


def test_an_error_reaches_its_caller_and_frees_the_place(pool, model):
    dispatcher = Dispatcher(concurrency=1, queue=2)
    model.go.release(2)
    with pytest.raises(RuntimeError, match="the model failed"):
        dispatcher.act(model, ["fail"], caller())
    assert dispatcher.act(model, ["fine"], caller()).proposals[0].action == "fine"


def test_who_waits_for_the_same_policy_shares_a_run(pool, model):
    dispatcher, other = Dispatcher(concurrency=1, queue=8, max_batch=3), Model()
    calls = {name: ask(pool, dispatcher, model, name) for name in ("first", "b", "c")}
    stranger = ask(pool, dispatcher, other, "other")
    calls |= {name: ask(pool, dispatcher, model, name) for name in ("d", "e")}
    model.go.release(3)
    other.go.release()
    assert {name: call.result(5).proposals[0].action for name, call in calls.items()} == {n: n for n in calls}
    assert stranger.result(5).proposals[0].action == "other"
    assert model.runs == [["first"], ["b", "c", "d"], ["e"]]


def test_who_shares_a_run_has_had_an_inference_too(pool, model):
    dispatcher = Dispatcher(concurrency=1, queue=8, max_batch=3)
    for name in ("first", "b", "c"):
        dispatcher.admit(name)
    calls = [ask(pool, dispatcher, model, name) for name in ("first", "b", "c")]
    model.go.release(2)
    assert all(call.result(5) for call in calls)
    assert [client.starts.events for client in dispatcher._rhythm._clients.values()] == [1.0, 1.0, 1.0]


def test_a_failure_of_a_shared_run_is_everyones(pool, model):
    dispatcher = Dispatcher(concurrency=1, queue=8, max_batch=3)
    calls = [ask(pool, dispatcher, model, name) for name in ("first", "fail", "c")]
    model.go.release(2)
    assert calls[0].result(5)
    for call in calls[1:]:
        with pytest.raises(RuntimeError):
            call.result(5)
    assert (dispatcher.running, dispatcher.waiting) == (0, 0)


@pytest.fixture
def full(pool, model, clock):
    """A dispatcher with one call before the model and four in the line; an inference takes 10 ms."""
    dispatcher = Dispatcher(concurrency=1, queue=4, client_hz=60)
    dispatcher._rhythm.took(0.01)
    calls = [ask(pool, dispatcher, model, name) for name in "abcde"]
    yield dispatcher
    model.go.release(len(calls))
    assert all(call.result(5) for call in calls)


def refused(dispatcher, clock, hz, clients=4, calls=400):
    for i in range(calls):
        clock.now += 1 / hz
        with pytest.raises(Rejected):
            dispatcher.admit(f"client {i % clients}")


def test_in_an_overload_only_the_next_may_wait(full, clock):
    """More is asked than there is: a longer line would serve nobody more, and everybody later."""
    refused(full, clock, hz=80)
    with pytest.raises(Rejected, match="at most 4 waiting"):
        full.act(None, ["late"], caller("late"))
    refused(full, clock, hz=160)
    with pytest.raises(Rejected, match="at most 1 waiting"):
        full.act(None, ["late"], caller("late"))
    clock.now += 2.0
    with pytest.raises(Rejected, match="at most 4 waiting"):
        full.act(None, ["late"], caller("late"))


def test_in_an_overload_nobody_waits_for_most_of_an_inference(pool, model, clock, monkeypatch):
    """In a moment somebody else comes, and his answer will be younger."""
    dispatcher = Dispatcher(concurrency=1, queue=4)
    dispatcher._rhythm.took(0.01)
    calls = [ask(pool, dispatcher, model, "first")]
    monkeypatch.setattr(dispatcher._rhythm, "asked_too_much", lambda _now: True)
    clock.now += 0.004
    with pytest.raises(Rejected, match="nearly free"):
        dispatcher.act(model, ["early"], caller("early"))
    clock.now += 0.002
    calls.append(ask(pool, dispatcher, model, "later"))
    model.go.release(2)
    assert all(call.result(5) for call in calls)


def test_in_an_overload_it_is_not_always_the_same_who_may_not_wait(pool, model, clock, monkeypatch):
    """Beats can keep a call just behind another's: nobody is refused for ever."""
    dispatcher = Dispatcher(concurrency=1, queue=4)
    dispatcher._rhythm.took(0.01)
    monkeypatch.setattr(dispatcher._rhythm, "asked_too_much", lambda _now: True)

    def beat():
        """The one comes first, and the other just behind: whether that one may wait."""
        for name in ("one", "other"):
            dispatcher._rhythm.asks(name, clock.now)
        calls = [ask(pool, dispatcher, model, "one"), ask(pool, dispatcher, model, "other", caller("other"))]
        model.go.release(2)
        served = calls[1].exception(5) is None
        assert calls[0].result(5)
        model.go = threading.Semaphore(0)
        clock.now += 0.05
        return served

    assert [beat() for _ in range(2 * (OFTEN_MISSED + 1))] == 2 * ([False] * OFTEN_MISSED + [True])


def test_a_rare_caller_takes_the_last_place_from_no_other_controller(pool, model, clock):
    """There is time enough for all three: who comes just behind another waits for one inference."""
    dispatcher = Dispatcher(concurrency=1, queue=4, max_wait_s=0.02, client_hz=60)
    dispatcher._rhythm.took(0.03)
    for i in range(20):
        clock.now += 0.1
        for name in ("one", "other", "rare") if i % 4 == 0 else ("one", "other"):
            dispatcher.admit(name)
    assert dispatcher._room == 1
    assert dispatcher._rhythm.rarer("other", clock.now)
    calls = [ask(pool, dispatcher, model, name, caller(name)) for name in ("one", "other")]
    assert (dispatcher.running, dispatcher.waiting) == (1, 1)
    model.go.release(2)
    assert all(call.result(5) for call in calls)


def test_beside_a_rare_caller_nobody_starves_in_an_overload(pool, model, clock):
    """Two at 20 Hz, one just behind the other, and an inference takes 45 ms: each asks for more than its share."""
    dispatcher = Dispatcher(concurrency=1, queue=4, max_wait_s=0.02, client_hz=60)
    dispatcher._rhythm.took(0.045)
    served = 0
    for i in range(40):
        if i % 10 == 0:
            with contextlib.suppress(Rejected):
                dispatcher.admit("rare")
        calls = []
        for name in ("one", "other"):
            with contextlib.suppress(Rejected):
                dispatcher.admit(name)
                calls.append((name, ask(pool, dispatcher, model, name, caller(name))))
            clock.now += 0.001
        model.go.release(len(calls))
        served += sum(call.exception(5) is None for name, call in calls if name == "other")
        model.go = threading.Semaphore(0)
        clock.now += 0.048
    assert served >= 40 // (OFTEN_MISSED + 2)


def test_the_parts_of_one_call_are_refused_once(pool, model, clock, monkeypatch):
    """A batch comes in parts, one after the other: it starves no sooner than a robot."""
    dispatcher = Dispatcher(concurrency=1, queue=4)
    dispatcher._rhythm.took(0.01)
    first = ask(pool, dispatcher, model, "first")
    monkeypatch.setattr(dispatcher._rhythm, "asked_too_much", lambda _now: True)
    for _ in range(OFTEN_MISSED - 1):
        dispatcher._rhythm.asks("batch", clock.now)
        for part in range(10):
            with pytest.raises(Rejected, match="nearly free"):
                dispatcher.act(model, [part], caller("batch"))
    assert not dispatcher._rhythm.starves("batch")
    model.go.release()
    assert first.result(5)


def test_callers_who_get_their_answers_are_no_overload(clock):
    """As many as there may be, each after his answer, and a model that has just become slower."""
    dispatcher = Dispatcher(concurrency=1, queue=4)
    for i in range(400):
        clock.now += 0.001
        dispatcher.admit(f"client {i % 5}")
    dispatcher._rhythm.took(0.1)
    assert dispatcher._room == 4


def test_a_flood_does_not_make_the_line_shorter_for_others(full, clock):
    """What is refused to it is not their overload."""
    for _ in range(100):
        refused(full, clock, hz=400, clients=1, calls=20)
        with contextlib.suppress(Rejected):
            full.admit("robot")
    assert full._room == 4
    refused(full, clock, hz=400)
    assert full._room == 1


def test_many_threads_leave_nothing_behind(pool):
    dispatcher, model = Dispatcher(concurrency=3, queue=6, max_batch=2, max_wait_s=0.02, client_hz=50), Model()
    model.go.release(10_000)

    def one(i):
        try:
            dispatcher.admit(f"client {i % 5}")
            turn = dispatcher.act(model, [i], caller(f"client {i % 5}", within_s=(0.0005, 5)[i % 2]))
            return turn.proposals[0].action == i
        except Rejected:
            return None

    outcomes = list(pool.map(one, range(2000)))
    assert False not in outcomes
    assert outcomes.count(True) > 20
    assert (dispatcher.running, dispatcher.waiting, dispatcher._running) == (0, 0, {})
