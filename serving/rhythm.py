"""Who asks too much of the model, and whose call is due: controllers call like clocks, so it can be foreseen.

An inference cannot be interrupted. Who asks for more than a controller does, or for more than a fair share of the
model's time, is held to a rate while others act, and may not start what another's next call would have to wait for.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

WINDOW_S = 1.0
"""Over how long rates are averaged, and how long after its last call a client still counts."""
REGULAR = 0.25
"""A call may come so much of a period early or late and still belong to the beat."""
ON_BEAT, OFF_BEAT = 2, 4
"""So many calls in a row on the beat, and a client is regular; so many in a row off it, and it has another beat."""
MUCH_MORE = 2.0
"""Times as often as another: only then one is in the other's way. Equals share by turns."""
SOON_S, TOO_MUCH, OFTEN = 0.2, 1.25, 0.05
"""An overload: so many times what there is is asked for, and of the last moment's calls so many were refused. Callers
who wait for each answer ask for about all there is, and for more where the model has just become slower."""
OFTEN_MISSED = 6
"""Who was refused so many calls in a row starves: beats can keep one client's calls just behind another's for ever."""
MARGIN_S = 0.005
"""A place is kept free from so long before an inference would be in the way, and so long for a call that is late."""
REMEMBERED, QUIET_S = 256, 60.0
"""Clients, and who asks without acting; the one that was quiet longest goes, and who was for so long: clients that come
and go would be kept for hours."""


@dataclass(slots=True)
class _Rate:
    """Events in the window, older ones weighing less."""

    window_s: float = WINDOW_S
    events: float = 0.0
    last: float = -math.inf

    def note(self, now: float, count: int = 1) -> None:
        self.events, self.last = self.at(now) * self.window_s + count, now

    def at(self, now: float) -> float:
        """Hz."""
        return self.events * math.exp((self.last - now) / self.window_s) / self.window_s


@dataclass(slots=True)
class _Client:
    since: float
    """When it asked first."""
    asks: _Rate = field(default_factory=_Rate)
    starts: _Rate = field(default_factory=_Rate)
    period_s: float = math.inf
    on_beat: int = 0
    off_beat: int = 0
    coming: bool = False
    """Its call is on its way from the door to the model."""
    missed: int = 0
    """Calls in a row that did not reach the model."""

    def ask(self, now: float) -> None:
        gap = now - self.asks.last
        self.asks.note(now)
        self.coming = True
        if abs(gap - self.period_s) <= REGULAR * self.period_s < math.inf:
            self.period_s += 0.2 * (gap - self.period_s)
            self.on_beat, self.off_beat = self.on_beat + 1, 0
        else:
            self.off_beat += 1
            if self.off_beat >= OFF_BEAT or math.isinf(self.period_s):
                self.period_s, self.on_beat, self.off_beat = gap, 0, 0

    def hz(self, now: float) -> float:
        """As its beat says, or as often as it asked: a window fills slowly."""
        return max(1 / self.period_s if self._keeps_beat(now) and self.period_s else 0.0, self.asks.at(now))

    def known(self, now: float) -> bool:
        """How often it asks can be said: it has not just begun, and a beat that it had has not just ended."""
        return self._keeps_beat(now) if self.on_beat >= ON_BEAT else now - self.since >= WINDOW_S

    def _keeps_beat(self, now: float) -> bool:
        return self.on_beat >= ON_BEAT and now - self.asks.last < 2 * self.period_s

    def due(self, now: float, within_s: float) -> bool:
        """Its next call comes within that time, if it keeps its beat, or has come and not reached the model yet."""
        next_s = self.asks.last + self.period_s - now
        here = self.coming and now - self.asks.last < MARGIN_S
        return self.on_beat >= ON_BEAT and (here or -MARGIN_S < next_s < within_s + MARGIN_S)


class Rhythm:
    """What clients ask of the model. Times are time.monotonic seconds. Not thread-safe: the dispatcher's lock is.

    Args:
        concurrency: inferences at the same time.
        client_hz: calls a second that one client may make while others act, too.
    """

    def __init__(self, concurrency: int, client_hz: float) -> None:
        self._concurrency, self.client_hz = concurrency, client_hz
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        """Who asked last stands last."""
        self._asks, self._refusals = _Rate(SOON_S), _Rate(SOON_S)
        self._questions: dict[str, _Rate] = {}
        self.turn_s = 0.0
        """What an inference usually takes."""

    def asks(self, name: str, now: float) -> None:
        client = self._clients.get(name)
        if client is None:
            self._forget(now)
            client = self._clients[name] = _Client(now)
        client.ask(now)
        self._clients.move_to_end(name)
        self._asks.note(now)

    def _forget(self, now: float) -> None:
        """Who was quiet longest, to make room for one more."""
        while self._clients:
            longest = next(iter(self._clients.values()))
            if len(self._clients) < REMEMBERED and now - longest.asks.last < QUIET_S:
                break
            self._clients.popitem(last=False)

    def admits_question(self, name: str, now: float) -> bool:
        """Whether a call of `name` that needs no model may be answered, and count it: as often as it pleases, but
        --client-hz beside others who act, as it takes the interpreter from them."""
        rate = self._questions.get(name)
        if rate is None:
            if len(self._questions) >= REMEMBERED:
                del self._questions[min(self._questions, key=lambda n: self._questions[n].last)]
            rate = self._questions[name] = _Rate()
        if rate.at(now) >= self.client_hz and self._active(now).keys() - {name}:
            return False
        rate.note(now)
        return True

    def asks_more(self, name: str, now: float, inferences: int) -> None:
        """Its call wants so many besides the first: a batch at 4 Hz may ask for more than a robot at 20."""
        if name in self._clients:
            self._clients[name].asks.note(now, inferences)
            self._clients.move_to_end(name)

    def refuses(self, name: str, now: float) -> None:
        """A call, for want of room."""
        if self.holds_back(name):
            self._refusals.note(now)

    def holds_back(self, name: str) -> bool:
        """A call is refused, for whatever reason. False where it is a part of one that has been counted already."""
        client = self._clients.get(name)
        if client is None:
            return True
        counts, client.coming = client.coming, False
        client.missed += counts
        return counts

    def starves(self, name: str) -> bool:
        return name in self._clients and self._clients[name].missed >= OFTEN_MISSED

    def starts(self, name: str, now: float, inferences: int = 1) -> None:
        if name in self._clients:
            self._clients[name].starts.note(now, inferences)
            self._clients[name].coming, self._clients[name].missed = False, 0

    def took(self, seconds: float) -> None:
        self.turn_s += (0.1 if self.turn_s else 1.0) * (seconds - self.turn_s)

    def asked_too_much(self, now: float) -> bool:
        """All clients together ask for many more inferences than there are. Of one that asks much more often than
        another, only what it may have counts: the rest is refused to it, and is not the others' overload.
        """
        if self._refusals.at(now) <= OFTEN * self._asks.at(now):
            return False
        clients = [(client.hz(now), client.known(now)) for client in self._active(now).values()]
        rarest = min((hz for hz, known in clients if known), default=math.inf)
        counted = (min(hz, self.client_hz) if rarest < self._rarer_than(hz) else hz for hz, _ in clients)
        return self._asked(counted) > TOO_MUCH

    def _asked(self, hz: Iterable[float]) -> float:
        """What is asked for, of what there is."""
        return sum(hz) * self.turn_s / self._concurrency

    def is_in_the_way(self, name: str, now: float, inferences: int = 1) -> bool:
        """So many for `name`, begun now, would be at the cost of clients that ask for less."""
        if not self.floods(name, now):
            return False
        if self._clients[name].starts.at(now) >= self.client_hz:
            return True
        soon = inferences * self.turn_s
        return not self._is_let_go(name, now) and any(client.due(now, soon) for client in self.rarer(name, now))

    def yields(self, name: str, now: float) -> bool:
        """It floods, and clients that ask for less go first; but not so long that a controller starves."""
        return not self._is_let_go(name, now) and self.floods(name, now)

    def _is_let_go(self, name: str, now: float) -> bool:
        return self.starves(name) and self._clients[name].hz(now) <= self.client_hz

    def floods(self, name: str, now: float) -> bool:
        """Beside clients that ask for less, `name` asks for more than a controller does, or than a fair share."""
        if not self.rarer(name, now):
            return False
        active = self._active(now)
        asked = active[name].hz(now)
        fits = self._asked(c.hz(now) for c in active.values()) <= 1 or self._asked([asked]) <= 1 / len(active)
        return asked > self.client_hz or not fits

    def part(self, name: str, most: int, now: float) -> int:
        """Up to `most` inferences of `name` in a row that fit, twice, between calls of clients that ask for less."""
        soonest = min((c.period_s for c in self.rarer(name, now) if c.on_beat >= ON_BEAT), default=math.inf)
        if not self.turn_s or math.isinf(soonest):
            return most
        return max(1, min(most, int((soonest - 2 * MARGIN_S) / (2 * self.turn_s))))

    def is_rarer(self, other: str, name: str, now: float) -> bool:
        """`other` asks much less often than `name`, and no more often than a controller."""
        return any(client is self._clients.get(other) for client in self.rarer(name, now))

    def rarer(self, name: str, now: float) -> list[_Client]:
        """Active clients that ask much less often than `name`, and no more often than a controller."""
        active = self._active(now)
        if len(active) < 2:  # a lone client, as most are: every call comes here several times
            return []
        mine = active.get(name)
        most = self._rarer_than(mine.hz(now)) if mine else 0.0
        return [c for c in active.values() if c.known(now) and c.hz(now) < most]

    def is_alone(self, name: str, now: float) -> bool:
        """It is active, and nobody else."""
        return self._active(now).keys() == {name}

    def _rarer_than(self, hz: float) -> float:
        """Whoever asks less often than this asks much less often than `hz`, and no more often than a controller."""
        return min(hz / MUCH_MORE, self.client_hz)

    def _active(self, now: float) -> dict[str, _Client]:
        """Those of the window, and no look at all who came and went before."""
        active = {}
        for name in reversed(self._clients):
            client = self._clients[name]
            if now - client.asks.last >= WINDOW_S:
                break
            active[name] = client
        return active
