"""How sure a success rate is, said in one place: every report and plot speaks of the same interval."""

from typing import NamedTuple


class Interval(NamedTuple):
    """Bounds of a rate, 0 to 1."""

    low: float
    high: float


def wilson(successes: int, episodes: int) -> Interval:
    """The 95 % score interval of Wilson (1927), which is no wider than 0 to 1 where all succeed or none."""
    from scipy.stats import binomtest  # a second to import, and needed only when a report is written

    found = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return Interval(float(found.low), float(found.high))
