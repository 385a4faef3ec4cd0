"""How sure a success rate is, said in one place: every report and plot speaks of the same interval."""

import math
from statistics import NormalDist
from typing import NamedTuple

Z = NormalDist().inv_cdf(0.975)
"""Of 95 %."""


class Interval(NamedTuple):
    """Bounds of a rate, 0 to 1."""

    low: float
    high: float


def wilson(successes: int, episodes: int) -> Interval:
    """The 95 % score interval (Wilson, 1927, eq. 1), which ends at 0 where none succeed and at 1 where all do.

    scipy has it, too: a second to import and a millisecond a call, which the training loop asks for again and again.
    """
    rate, more = successes / episodes, Z**2 / episodes
    middle, half = rate + more / 2, Z * math.sqrt(rate * (1 - rate) / episodes + more / (4 * episodes))
    low, high = (middle - half) / (1 + more), (middle + half) / (1 + more)
    return Interval(low if successes else 0.0, high if successes < episodes else 1.0)
