"""Demand forgets exponentially and stays bounded."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.demand import Demand


def test_steady_arrivals_read_their_rate():
    """Two requests a second of 100 tokens, for ten half-lives: 2/s and 200/s."""
    demand = Demand(half_life_s=60.0)
    for tick in range(1200):
        demand.add("a@1", 1.0, 100.0, tick * 0.5)
    rate = demand.rate("a@1", 600.0)
    assert rate.requests_per_s == pytest.approx(2.0, rel=0.01)
    assert rate.tokens_per_s == pytest.approx(200.0, rel=0.01)
    assert rate.idle_s == pytest.approx(0.5)


def test_a_half_life_halves():
    """One half-life without requests leaves half the rate."""
    demand = Demand(half_life_s=30.0)
    demand.add("a@1", 10.0, 1000.0, 0.0)
    before, after = demand.rate("a@1", 0.0), demand.rate("a@1", 30.0)
    assert before.requests_per_s == pytest.approx(10 * math.log(2) / 30)
    assert after.requests_per_s == pytest.approx(before.requests_per_s / 2)
    assert after.tokens_per_s == pytest.approx(before.tokens_per_s / 2)
    assert after.idle_s == 30.0


def test_the_least_asked_for_is_forgotten():
    """One version too many drops the one with the smallest decayed rate, and counts it."""
    demand = Demand(half_life_s=10.0, max_versions=2)
    demand.add("old@1", 3.0, 0.0, 0.0)
    demand.add("new@1", 1.0, 0.0, 60.0)
    demand.add("third@1", 1.0, 0.0, 60.0)
    assert set(demand.rates(60.0)) == {"new@1", "third@1"}
    assert demand.num_forgotten == 1
    assert demand.rate("old@1", 60.0).requests_per_s == 0.0


def test_tokens_of_a_known_request_do_not_end_idleness():
    """Tokens that are added when a stream ends are no new request."""
    demand = Demand()
    demand.add("a@1", 1.0, 10.0, 0.0)
    demand.add("a@1", 0.0, 500.0, 40.0)
    assert demand.rate("a@1", 40.0).idle_s == 40.0


def test_forgotten_versions_are_idle_for_ever():
    """A deleted version has no rate."""
    demand = Demand()
    demand.add("a@1", 1.0, 1.0, 0.0)
    demand.forget("a@1")
    assert len(demand) == 0
    assert demand.rate("a@1", 1.0).idle_s == math.inf


@pytest.mark.parametrize(("half_life_s", "max_versions"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_limits_must_be_above_zero(half_life_s, max_versions):
    """Anything else would divide by zero or hold nothing."""
    with pytest.raises(ValueError, match="above zero"):
        Demand(half_life_s, max_versions)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 100)), max_size=40))
def test_clocks_that_run_backwards_do_no_harm(events):
    """Rates stay finite and at least zero, whatever order the times come in."""
    demand = Demand(half_life_s=5.0)
    for now_s, requests in events:
        demand.add("a@1", requests, requests, now_s)
    rate = demand.rate("a@1", 0.0)
    assert 0.0 <= rate.requests_per_s < math.inf
    assert rate.idle_s >= 0.0
