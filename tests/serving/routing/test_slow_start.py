"""Less than its share for a replica that has just come up, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.routing.policy import least_outstanding_tokens
from serving.routing.slow_start import share, weighed


@pytest.mark.parametrize(
    ("after_s", "expected"),
    [(0.0, 0.1), (1.0, 0.1), (2.0, 0.1), (5.0, 0.25), (10.0, 0.5), (20.0, 1.0), (99.0, 1.0)],
)
def test_share(after_s: float, expected: float) -> None:
    """From a tenth to the whole, in a straight line."""
    assert share(100.0, 100.0 + after_s, 20.0) == pytest.approx(expected)


def test_no_slow_start() -> None:
    """A ramp of no length is over at once."""
    assert share(100.0, 100.0, 0.0) == 1.0


@given(st.floats(0.0, 1e6), st.floats(0.0, 100.0), st.floats(0.01, 100.0))
def test_any_share(up_since: float, after_s: float, slow_start_s: float) -> None:
    """Between a tenth and one, and never falling."""
    now = share(up_since, up_since + after_s, slow_start_s)
    assert 0.1 <= now <= 1.0
    assert share(up_since, up_since + after_s + 1.0, slow_start_s) >= now


def test_weight() -> None:
    """A warm replica weighs what it has; one at a tenth as if each token were ten."""
    assert weighed(500.0, 100, 1.0) == 500.0
    assert weighed(0.0, 100, 0.1) == pytest.approx(900.0)


def test_traffic_of_a_warming_replica() -> None:
    """Under a steady load it gets about its share: a quarter of what each other one gets."""
    loads = [0.0, 0.0, 0.0]
    placed = [0, 0, 0]
    for number in range(900):
        seen = [weighed(loads[0], 100, 0.25), *loads[1:]]
        chosen = least_outstanding_tokens(seen, number)
        loads[chosen] += 100
        placed[chosen] += 1
    assert placed[0] == pytest.approx(900 / 9, abs=3)
    assert placed[1] == pytest.approx(400, abs=3)
