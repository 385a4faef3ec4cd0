"""Who is in the way: by rates and beats alone, on a clock of the test's own."""

import numpy as np
import pytest

from serving.rhythm import MARGIN_S, OFTEN_MISSED, ON_BEAT, QUIET_S, REMEMBERED, WINDOW_S, Rhythm

TURN_S, LIMIT_HZ = 0.010, 60.0


def beats(rhythm, name, hz, until, start=0.0, rng=None):
    """`name` asks at that rate from `start`; when it last asked."""
    times = np.arange(start, until, 1 / hz)
    for t in times if rng is None else times + rng.uniform(-0.1, 0.1, len(times)) / hz:
        rhythm.asks(name, float(t))
    return float(times[-1])


def together(*clients, until=3.0):
    """A rhythm that heard these (name, hz) side by side, in order of time."""
    rhythm = Rhythm(1, LIMIT_HZ)
    rhythm.took(TURN_S)
    calls = sorted((t, name) for name, hz in clients for t in np.arange(0.0, until, 1 / hz))
    for t, name in calls:
        rhythm.asks(name, float(t))
    return rhythm


def test_who_is_alone_is_in_nobodys_way():
    rhythm = together(("fast", 500))
    rhythm.starts("fast", 2.9)
    assert not rhythm.is_in_the_way("fast", 3.0)
    assert not rhythm.is_in_the_way("never seen", 3.0)


def test_who_floods_may_not_start_before_a_robots_next_call_and_may_after_it():
    rhythm = together(("flood", 200), ("robot", 20))
    last = 2.95
    assert not rhythm.is_in_the_way("flood", last + MARGIN_S + 0.001)
    assert not rhythm.is_in_the_way("flood", last + 0.05 - TURN_S - MARGIN_S - 0.001)
    assert rhythm.is_in_the_way("flood", last + 0.05 - TURN_S / 2)
    assert rhythm.is_in_the_way("flood", last + 0.05 + MARGIN_S / 2)  # a little late
    assert not rhythm.is_in_the_way("flood", last + 0.05 + MARGIN_S + 0.001)  # it is not coming
    assert not rhythm.is_in_the_way("robot", last + 0.05)


def test_a_call_between_the_door_and_the_model_is_still_due():
    """Its message is being read: an inference begun now would be in its way after all."""
    rhythm = together(("flood", 200), ("robot", 20))
    rhythm.asks("robot", 3.0)
    assert rhythm.is_in_the_way("flood", 3.001)
    rhythm.starts("robot", 3.0015)
    assert not rhythm.is_in_the_way("flood", 3.002)
    rhythm.asks("robot", 3.05)
    assert not rhythm.is_in_the_way("flood", 3.05 + MARGIN_S + 0.001)  # it was refused on its way


def test_questions_are_counted_beside_who_acts_and_free_else():
    """GetStats as fast as it is answered takes the interpreter from the robots."""
    rhythm = together(("robot", 20))
    times = np.arange(3.0, 5.0, 1 / 1000)
    answered = []
    for t in times:
        if round(t * 1000) % 50 == 0:
            rhythm.asks("robot", float(t))
        answered.append(rhythm.admits_question("curious", float(t)))
    assert sum(answered[1000:]) == pytest.approx(LIMIT_HZ, rel=0.1)
    assert rhythm.admits_question("robot", 5.0)  # whose own calls are nobody else's
    assert all(rhythm.admits_question("curious", float(t)) for t in 5.0 + WINDOW_S + times)


def test_who_asks_without_acting_is_forgotten_too():
    rhythm = Rhythm(1, LIMIT_HZ)
    for i in range(3 * REMEMBERED):
        assert rhythm.admits_question(f"curious {i}", float(i))
    assert len(rhythm._questions) == REMEMBERED


def test_a_batch_asks_for_as_much_as_it_takes():
    rhythm = together(("batches", 4), ("robot", 20))
    assert rhythm.rarer("robot", 3.0)  # by calls alone
    for turn in np.arange(0.0, 3.0, 1 / 32):
        rhythm.asks_more("batches", 3.0 + float(turn), 7)
        if turn % (1 / 4) < 1 / 32:
            rhythm.asks("batches", 3.0 + float(turn))
        if turn % (1 / 20) < 1 / 32:
            rhythm.asks("robot", 3.0 + float(turn))
    assert not rhythm.rarer("robot", 6.0)
    assert len(rhythm.rarer("batches", 6.0)) == 1


@pytest.mark.parametrize(("hz", "turn_s", "size"), [(50, 0.0025, 2), (20, 0.0025, 8), (20, 0.05, 1)])
def test_a_part_of_a_batch_fits_between_a_robots_calls(hz, turn_s, size):
    rhythm = together(("batches", 200), ("robot", hz))
    rhythm.turn_s = turn_s
    assert rhythm.part("batches", 8, 3.0) == size
    assert rhythm.part("robot", 8, 3.0) == 8


def test_robots_within_a_controllers_rate_never_yield():
    rhythm = together(("one", 20), ("two", 50), ("three", 10))
    for name in ("one", "two", "three"):
        assert not any(rhythm.is_in_the_way(name, 3 + t) for t in np.linspace(0, 0.1, 50))


def test_a_slow_model_is_shared_by_time_even_at_a_controllers_rate():
    rhythm = Rhythm(1, LIMIT_HZ)
    rhythm.took(0.030)
    for t, name in sorted((t, n) for n, hz in (("heavy", 30), ("robot", 10)) for t in np.arange(0, 3, 1 / hz)):
        rhythm.asks(name, float(t))
    assert rhythm.is_in_the_way("heavy", 2.99)  # asks for 90 % of the time; the robot is due at 3.0
    assert not rhythm.is_in_the_way("robot", 2.99)


def refused_beside_a_robot(rhythm, name, hz, calls):
    """From 3 s on `name` asks and is refused, in the way of a robot at 20 Hz: when the last of these calls came."""
    robots = iter(np.arange(3.0, 3.0 + calls / hz + 0.05, 0.05))
    next_one = next(robots)
    for now in 3.0 + np.arange(calls) / hz:
        while next_one <= now + 1e-9:
            rhythm.asks("robot", next_one)
            next_one = next(robots)
        rhythm.asks(name, now)
        assert rhythm.is_in_the_way(name, now)
        rhythm.holds_back(name)
    return now


def test_a_controller_does_not_starve_beside_one_whose_next_call_is_always_due():
    """Within its rate: the robot alone asks for nine tenths of the model's time, which is more than its share."""
    rhythm = together(("fast", 50), ("robot", 20))
    rhythm.turn_s = 0.045
    now = refused_beside_a_robot(rhythm, "fast", 50, OFTEN_MISSED)
    assert rhythm._clients["robot"].due(now + 0.001, rhythm.turn_s)
    assert not rhythm.is_in_the_way("fast", now + 0.001)
    rhythm.starts("fast", now)
    assert not rhythm.starves("fast")


def test_a_flood_yields_however_often_it_is_refused():
    rhythm = together(("flood", 200), ("robot", 20))
    rhythm.turn_s = 0.045
    refused_beside_a_robot(rhythm, "flood", 200, 5 * OFTEN_MISSED)
    assert rhythm.starves("flood")


def test_beyond_its_rate_a_flood_waits_for_the_robots_to_go():
    rhythm = together(("flood", 200), ("robot", 20))
    for t in np.arange(2.0, 2.97, 1 / 120):
        rhythm.starts("flood", float(t))
    quiet = 2.95 + 0.02  # no call is due
    assert rhythm._clients["flood"].starts.at(quiet) >= LIMIT_HZ
    assert rhythm.is_in_the_way("flood", quiet)
    for t in np.arange(2.97, 4.5, 1 / 200):
        rhythm.asks("flood", float(t))
        rhythm.starts("flood", float(t))
    assert not rhythm.is_in_the_way("flood", 4.5)  # the robot has been quiet for longer than the window
    rhythm.asks("robot", 4.5)
    assert rhythm.is_in_the_way("flood", 4.51)


def test_two_floods_do_not_yield_to_each_other():
    rhythm = together(("a", 200), ("b", 190))
    for t in np.arange(2, 3, 0.005):
        rhythm.starts("a", float(t))
    assert not rhythm.is_in_the_way("a", 3.0)


def test_equals_share_an_overload_by_turns():
    """Rates that differ by chance must not make everybody yield to everybody."""
    rhythm = Rhythm(1, LIMIT_HZ)
    rhythm.took(0.020)
    for t, i in sorted((i / 70 + k / (9 + 0.1 * i), i) for i in range(8) for k in range(27)):
        rhythm.asks(f"robot {i}", t)
    assert not any(rhythm.is_in_the_way(f"robot {i}", 3 + t) for i in range(8) for t in np.linspace(0, 0.1, 50))


@pytest.mark.parametrize("hz", [5, 20, 50])
def test_a_beat_survives_jitter_and_a_skipped_call(hz):
    rhythm = Rhythm(1, LIMIT_HZ)
    rng = np.random.default_rng(hz)
    last = beats(rhythm, "robot", hz, 3.0, rng=rng)
    last = beats(rhythm, "robot", hz, last + 2.2 / hz + 3.0, start=last + 2 / hz, rng=rng)
    client = rhythm._clients["robot"]
    assert client.period_s == pytest.approx(1 / hz, rel=0.1)
    assert client.on_beat >= ON_BEAT


def test_a_new_beat_is_learned():
    rhythm = Rhythm(1, LIMIT_HZ)
    last = beats(rhythm, "robot", 10, 2.0)
    beats(rhythm, "robot", 25, last + 1.0, start=last + 0.04)
    assert rhythm._clients["robot"].period_s == pytest.approx(0.04, rel=0.05)


def test_rates_are_in_hertz_and_fade():
    rhythm = Rhythm(1, LIMIT_HZ)
    last = beats(rhythm, "a", 100, 5.0)
    asks = rhythm._clients["a"].asks
    assert asks.at(last) == pytest.approx(100, rel=0.02)
    assert asks.at(last + WINDOW_S) == pytest.approx(100 / np.e, rel=0.02)


def test_names_do_not_pile_up():
    rhythm = Rhythm(1, LIMIT_HZ)
    for i in range(3 * REMEMBERED):
        rhythm.asks(f"client {i}", i / 1000)
    assert len(rhythm._clients) == REMEMBERED
    assert f"client {3 * REMEMBERED - 1}" in rhythm._clients


def test_who_is_quiet_for_long_is_forgotten():
    rhythm = Rhythm(1, 60.0)
    for i in range(10):
        rhythm.asks(f"visitor {i}", float(i))
    for second in range(10, 100):
        rhythm.asks("robot", float(second))
    rhythm.asks("another", 100.0)
    assert list(rhythm._clients) == ["robot", "another"]


def test_who_asks_for_more_of_a_call_under_way_is_active_whoever_else_asked_since():
    rhythm = Rhythm(1, LIMIT_HZ)
    rhythm.asks("batch", 0.0)
    rhythm.asks("robot", 0.5)
    rhythm.asks_more("batch", 0.5 + WINDOW_S / 2, 7)
    assert list(rhythm._active(0.5 + 1.2 * WINDOW_S)) == ["batch"]


def test_who_came_and_went_is_not_looked_at_again():
    """A server that has run for a month has heard of hundreds, and asks several times a call who is active."""

    class Counted(dict):
        looks = 0

        def __getitem__(self, name):
            self.looks += 1
            return super().__getitem__(name)

    rhythm = Rhythm(1, LIMIT_HZ)
    for i in range(REMEMBERED):
        rhythm.asks(f"client {i}", i / 1000)
    rhythm.asks("robot", QUIET_S / 2)
    rhythm._clients = clients = Counted(rhythm._clients)
    assert list(rhythm._active(QUIET_S / 2 + 0.1)) == ["robot"]
    assert clients.looks == 2


def test_a_robot_that_has_just_begun_is_not_taken_for_a_rare_caller():
    rhythm = Rhythm(1, LIMIT_HZ)
    rhythm.took(0.045)  # too slow for two robots at 20 Hz
    begun = 2.0
    for t, name in sorted(
        [(t, "old") for t in np.arange(0, 2.3, 0.05)] + [(t, "new") for t in begun + np.arange(0.02, 0.3, 0.05)]
    ):
        rhythm.asks(name, float(t))
    assert not rhythm.is_in_the_way("old", 2.3)
    assert rhythm.rarer("old", 2.3) == []


def test_a_beat_that_has_ended_counts_no_longer():
    rhythm = together(("robot", 20), ("flood", 200))
    assert rhythm.rarer("flood", 3.0)
    assert rhythm._clients["flood"].hz(3.0) == pytest.approx(200, rel=0.05)
    assert rhythm._clients["flood"].hz(3.5) < 150
