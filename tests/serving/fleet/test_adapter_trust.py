"""Doubts about a replica's adapters: what raises them and what ends them."""

from __future__ import annotations

import pytest

from serving.fleet.adapter_trust import HOLD_S, AdapterTrust, Cause
from serving.routing.published import Placement, PlacementState, Published, PublishedVersion

A = "a@000000000001"


def _published(number: int, state: PlacementState | None = "ready", epoch: str = "e") -> Published:
    placements = {} if state is None else {"r": Placement(state, "/a")}
    return Published(epoch, number, {}, {A: PublishedVersion("m", 1, 8, 1, placements)})


@pytest.mark.parametrize(
    ("cause", "after", "listed", "learnt_at", "now", "is_cleared"),
    [
        # A newer snapshot that says `ready`, of this database or of another.
        ("failed", _published(6), frozenset(), 0.0, 1.0, True),
        ("lost", _published(6), frozenset(), 0.0, 1.0, True),
        ("restarted", _published(6), None, 0.0, 1.0, True),
        ("lost", _published(5, epoch="f"), frozenset(), 0.0, 1.0, True),
        # The same one says nothing new, nor does a newer one that is not sure yet.
        ("failed", _published(5), frozenset(), 0.0, 1.0, False),
        ("lost", _published(6, "loaded"), frozenset({A}), 9.0, 1.0, False),
        ("lost", _published(6, "draining"), frozenset({A}), 9.0, 1.0, False),
        # The engine lists it after it had failed: believed. After it was lost: not proven yet.
        ("failed", _published(5), frozenset({A}), 0.9, 1.0, True),
        ("failed", _published(5), frozenset({A}), 0.4, 1.0, False),
        ("lost", _published(5), frozenset({A}), 0.9, 1.0, False),
        # Time alone, of an engine that lists none.
        ("restarted", _published(5), None, 0.0, 0.5 + HOLD_S - 0.1, False),
        ("restarted", _published(5), None, 0.0, 0.5 + HOLD_S + 0.1, True),
        ("lost", _published(5), frozenset(), 0.0, 1e6, False),
        # Placed there no more: nothing to doubt.
        ("lost", _published(5, None), frozenset(), 0.0, 1.0, True),
    ],
)  # fmt: skip
def test_review(
    cause: Cause,
    after: Published,
    listed: frozenset[str] | None,
    learnt_at: float,
    now: float,
    is_cleared: bool,
) -> None:
    """A doubt raised under snapshot 5, half a second in."""
    trust = AdapterTrust()
    trust.doubt([A], cause, _published(5), 0.5)
    assert trust.doubted == {A}
    assert trust.review("r", after, listed, learnt_at, now) is is_cleared
    assert trust.doubted == (frozenset() if is_cleared else {A})


def test_nothing_doubted() -> None:
    """There is nothing to review, and no change to tell."""
    assert not AdapterTrust().review("r", _published(1), None, 0.0, 0.0)
