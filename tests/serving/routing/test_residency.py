"""Which replica has an adapter in a slot, and what it costs where none has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engines import dialect_of
from serving.routing.policy import least_outstanding_tokens
from serving.routing.residency import (
    HOST_BYTES_PER_TOKEN,
    HOST_MISS_TOKENS,
    SLOT_MISS_TOKENS,
    Residency,
)
from serving.routing.snapshot import Adapter, Replica

REPLICAS = [Replica(index, f"r{index}", "h", index, dialect_of("vllm")) for index in range(3)]
LAZY = Replica(7, "r7", "h", 7, dialect_of("tensorrt-llm"))


def _adapter(name: str, size_bytes: int = 0) -> Adapter:
    return Adapter(name, 1, size_bytes, {})


def test_slots_are_least_recently_used() -> None:
    """The third version takes the place of the one that was used longest ago."""
    residency = Residency()
    for name in ("a", "b", "a", "c"):
        residency.use(0, name, 2)

    def is_resident(name: str) -> bool:
        return residency.cost_tokens(0, name, 0, loads_lazily=False) == 0

    assert [is_resident(name) for name in "abc"] == [True, False, True]
    residency.forget(0)
    assert not is_resident("a")


def test_costs() -> None:
    """Of a slot, of the bytes, and of an engine that reads the files at the first request."""
    residency = Residency()
    size_bytes = 10 * HOST_BYTES_PER_TOKEN
    assert residency.cost_tokens(0, "a", size_bytes, loads_lazily=False) == SLOT_MISS_TOKENS + 10
    assert residency.weighed([5.0], [LAZY], _adapter("a")) == [
        5.0 + SLOT_MISS_TOKENS + HOST_MISS_TOKENS
    ]
    for name in ("a", "b", "c"):
        residency.use(7, name, 2)
    assert residency.weighed([5.0], [LAZY], _adapter("a")) == [5.0 + SLOT_MISS_TOKENS]


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([0.0, 0.0, 0.0], 1),
        ([0.0, SLOT_MISS_TOKENS - 1.0, 0.0], 1),
        ([0.0, SLOT_MISS_TOKENS + 1.0, 9.0], 0),
    ],
)
def test_preference_ends_where_the_queue_is_longer(loads: list[float], chosen: int) -> None:
    """The resident replica is taken until it has more to do than a load costs."""
    residency = Residency()
    residency.use(1, "a")
    weighed = residency.weighed(loads, REPLICAS, _adapter("a"))
    assert least_outstanding_tokens(weighed, 0) == chosen


@given(
    uses=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abcdef")), max_size=60),
    num_slots=st.integers(1, 4),
)
def test_as_many_as_there_are_slots(uses: list[tuple[int, str]], num_slots: int) -> None:
    """On each replica exactly the versions that were used last are resident."""
    residency = Residency()
    for index, name in uses:
        residency.use(index, name, num_slots)
    for index in range(3):
        order = list(dict.fromkeys(name for at, name in reversed(uses) if at == index))
        resident = {
            name
            for name in "abcdef"
            if residency.cost_tokens(index, name, 0, loads_lazily=False) == 0
        }
        assert resident == set(order[:num_slots])
