"""Estimated tokens of a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.routing.cost import estimate_tokens


@pytest.mark.parametrize(
    ("body_bytes", "bound", "num_choices", "tokens"),
    [
        (0, 0, 1, 1),
        (400, None, 1, 1 + 100 + 256),
        (400, 50, 1, 1 + 100 + 50),
        (400, 50, 4, 1 + 100 + 200),
        (400, None, 2, 1 + 100 + 512),
        (400, 1_000_000, 1, 1 + 100 + 4096),
        (400, -5, 1, 1 + 100),
        (400, 50, 0, 1 + 100 + 50),
        (400, 50, -3, 1 + 100 + 50),
    ],
)
def test_known_costs(body_bytes: int, bound: int | None, num_choices: int, tokens: int) -> None:
    """A quarter of the body's bytes, and the bound of each choice."""
    assert estimate_tokens(body_bytes, bound, num_choices) == tokens


@given(st.integers(0, 10**9), st.none() | st.integers(), st.integers())
def test_cost_is_positive(body_bytes: int, bound: int | None, num_choices: int) -> None:
    """Whatever a client writes."""
    assert estimate_tokens(body_bytes, bound, num_choices) >= 1
