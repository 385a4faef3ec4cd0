"""The threads that answer calls: which of them does, what waits, and how they end."""

import threading
import time
from collections.abc import Iterator

import pytest

from serving.workers import Workers


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(4)
    workers.start()
    yield workers
    workers.shutdown()


def resting(workers: Workers, count: int) -> None:
    """Until so many do."""
    ends = time.monotonic() + 5
    while len(workers._resting) < count:
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_a_lone_caller_always_has_the_same_thread(workers: Workers):
    seen = set()
    for _ in range(50):
        resting(workers, 4)
        seen.add(workers.submit(threading.get_ident).result(5))
    assert len(seen) == 1


def test_as_many_at_once_as_there_are_threads(workers: Workers):
    together = threading.Barrier(4)
    assert len({f.result(5) for f in [workers.submit(together.wait) for _ in range(4)]}) == 4


def test_what_finds_no_thread_waits_its_turn(workers: Workers):
    resting(workers, 4)
    hold, order = threading.Event(), []
    held = [workers.submit(hold.wait, 5) for _ in range(4)]
    waiting = [workers.submit(order.append, i) for i in range(20)]
    time.sleep(0.05)
    assert not order
    assert not any(one.done() for one in held + waiting)
    hold.set()
    for one in waiting:
        one.result(5)
    assert sorted(order) == list(range(20))


def test_it_knows_how_long_a_call_waited_for_a_thread(workers: Workers):
    resting(workers, 4)
    assert workers.arrival() is None
    hold = threading.Event()
    held, asked = [workers.submit(hold.wait, 5) for _ in range(4)], time.perf_counter()
    late = workers.submit(workers.arrival)
    time.sleep(0.1)
    hold.set()
    arrival = late.result(5)
    assert abs(arrival.at - asked) < 0.05
    assert arrival.pool_s == pytest.approx(0.1, abs=0.05)
    assert all(one.result(5) for one in held)


def test_who_asked_is_told_what_went_wrong(workers: Workers):
    with pytest.raises(ZeroDivisionError):
        workers.submit(divmod, 1, 0).result(5)
    assert workers.submit(divmod, 7, 2).result(5) == (3, 1)


def test_who_does_not_want_it_any_more_is_not_answered(workers: Workers):
    resting(workers, 4)
    hold, done = threading.Event(), []
    held = [workers.submit(hold.wait, 5) for _ in range(4)]
    unwanted = workers.submit(done.append, 1)
    assert unwanted.cancel()
    hold.set()
    assert all(one.result(5) for one in held)
    resting(workers, 4)  # all of them live on
    assert not done


def test_what_waits_at_the_end_is_told_where_it_is_not_to_be_done():
    workers, hold = Workers(1), threading.Event()
    workers.start()
    held, waiting = workers.submit(hold.wait, 5), workers.submit(print)
    workers.shutdown(wait=False, cancel_futures=True)
    assert waiting.cancelled()
    assert not workers.ended(0)
    hold.set()
    assert held.result(5)
    assert workers.ended(5)


def test_shutdown_does_what_was_asked_and_ends_its_threads():
    workers = Workers(2)
    workers.start()
    done = []
    asked = [workers.submit(lambda i=i: (time.sleep(0.01), done.append(i))) for i in range(10)]
    workers.shutdown()
    assert sorted(done) == list(range(10))
    assert all(one.done() for one in asked)
    assert not any(thread.is_alive() for thread in workers._threads)
    with pytest.raises(RuntimeError, match="told to stop"):
        workers.submit(print)


def test_who_never_started_can_be_shut_down():
    Workers(2).shutdown()


def test_a_resting_thread_keeps_nothing_of_a_call(workers: Workers):
    gone = threading.Event()

    class Frame:
        def __del__(self) -> None:
            gone.set()

    workers.submit(lambda frame: None, Frame()).result(5)
    assert gone.wait(1)
