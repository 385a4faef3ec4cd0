"""The interval of a success rate is the one that statisticians mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from sim_client.interval import wilson


@given(st.data())
def test_it_is_wilson_s(data: st.DataObject) -> None:
    episodes = data.draw(st.integers(1, 10_000))
    successes = data.draw(st.integers(0, episodes))
    expected = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    assert wilson(successes, episodes) == pytest.approx((expected.low, expected.high), abs=1e-12)
