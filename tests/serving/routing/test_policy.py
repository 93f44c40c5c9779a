"""The choice of a replica."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.routing.policy import least_outstanding_tokens

_loads = st.lists(st.floats(0, 1e9), min_size=1, max_size=20)


@given(loads=_loads, rotation=st.integers(0, 10**9))
def test_a_least_loaded_replica_is_chosen(loads: list[float], rotation: int) -> None:
    """None has less outstanding than the chosen one."""
    assert loads[least_outstanding_tokens(loads, rotation)] == min(loads)


@given(num_equal=st.integers(1, 10), num_loaded=st.integers(0, 5))
def test_equals_take_turns(num_equal: int, num_loaded: int) -> None:
    """Over one round of rotation every equal replica is chosen, and no loaded one."""
    loads = [5.0] * num_loaded + [1.0] * num_equal
    chosen = {least_outstanding_tokens(loads, rotation) for rotation in range(len(loads))}
    assert chosen == set(range(num_loaded, len(loads)))


def test_idle_fleet_is_used_evenly() -> None:
    """Ten rounds over four idle replicas give each ten requests."""
    chosen = [least_outstanding_tokens([0.0] * 4, rotation) for rotation in range(40)]
    assert [chosen.count(index) for index in range(4)] == [10] * 4


def test_tokens_weigh_and_not_requests() -> None:
    """A long prompt outweighs several short ones."""
    assert least_outstanding_tokens([8_000.0, 3 * 300.0], 0) == 1
