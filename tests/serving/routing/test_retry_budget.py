"""Retries stay a share of the traffic, in virtual time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.routing.retry_budget import RetryBudget

START_S = 1000.0


def _granted(budget: RetryBudget, asked: int, now: float = START_S) -> int:
    return sum(budget.withdraw(now) for _ in range(asked))


def test_reserve() -> None:
    """A fresh gateway may retry as often as ten idle seconds allow, then no more."""
    assert _granted(RetryBudget(0.2, 10.0), 1000) == 100
    assert _granted(RetryBudget(0.2, 0.0), 1000) == 0


def test_share_of_the_traffic() -> None:
    """Beyond the reserve, one retry for five requests."""
    budget = RetryBudget(0.25, 0.0)
    for _ in range(100):
        budget.deposit()
    assert _granted(budget, 1000) == 25


def test_rate() -> None:
    """Without traffic, the reserve fills again at its rate."""
    budget = RetryBudget(0.0, 10.0)
    _granted(budget, 1000)
    assert _granted(budget, 1000, START_S + 0.5) == 5
    assert _granted(budget, 1000, START_S + 1000.0) == 100


def test_credit_is_bounded() -> None:
    """A day without a failure does not pay for a storm of retries."""
    budget = RetryBudget(0.2, 10.0)
    for _ in range(1_000_000):
        budget.deposit()
    assert _granted(budget, 1000) == 120


@given(
    ratio=st.sampled_from([0.0, 0.125, 0.25, 1.0]),
    min_per_s=st.sampled_from([0.0, 1.0, 10.0]),
    steps=st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 50), st.floats(0.0, 5.0)), max_size=60
    ),
)
def test_any_traffic(ratio: float, min_per_s: float, steps: list[tuple[int, int, float]]) -> None:
    """Retries never exceed ratio x requests + reserve, whatever fails and when."""
    budget, now = RetryBudget(ratio, min_per_s), START_S
    requests = retries = 0
    for num_requests, num_failures, passed_s in steps:
        now += passed_s
        for _ in range(num_requests):
            budget.deposit()
        requests += num_requests
        retries += _granted(budget, num_failures, now)
        reserve = min_per_s * (10.0 + now - START_S)
        assert retries <= ratio * requests + reserve + 1e-6


def test_other_rates() -> None:
    """They hold from there on; what was saved up stays only as far as the new bound allows."""
    budget = RetryBudget(0.2, 10.0)
    budget.configure(0.5, 0.0)
    assert _granted(budget, 1000) == 50
    for _ in range(10):
        budget.deposit()
    assert _granted(budget, 1000) == 5
