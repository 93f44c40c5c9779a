"""The breaker of one replica, in virtual time."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config import Resilience
from serving.fleet.breaker import Breaker, BreakerState

if TYPE_CHECKING:
    from collections.abc import Iterable

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
SETTINGS = Resilience(breaker_failures=5, breaker_open_s=5.0, breaker_max_open_s=60.0)


def _opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(SETTINGS)
    for _ in range(5):
        breaker.failed(now)
    return breaker


def test_failures_in_a_row_open_it() -> None:
    """Five, and not one less; a success between them starts the count anew."""
    breaker = Breaker(SETTINGS)
    assert [breaker.failed(0.0) for _ in range(4)] == [False] * 4
    assert breaker.succeeded() is False
    assert [breaker.failed(0.0) for _ in range(5)] == [False] * 4 + [True]
    assert breaker.state is OPEN


def test_it_closes_through_a_trial() -> None:
    """Open for five seconds, then half-open until one request has succeeded."""
    breaker = _opened()
    assert (breaker.tick(4.9), breaker.state) == (False, OPEN)
    assert (breaker.tick(5.0), breaker.state) == (True, HALF_OPEN)
    assert (breaker.succeeded(), breaker.state) == (True, CLOSED)


def test_success_of_an_older_request_does_not_close_an_open_one() -> None:
    """What was under way when it opened says nothing about what comes next."""
    breaker = _opened()
    assert (breaker.succeeded(), breaker.state) == (False, OPEN)


def test_trial_without_a_verdict_is_due_again() -> None:
    """A half-open breaker does not wait for ever for a request that told it nothing."""
    breaker = _opened()
    assert [breaker.tick(now) for now in (5.0, 5.1, 9.9, 10.0, 10.1)] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert breaker.state is HALF_OPEN


def test_open_longer_each_time() -> None:
    """Twice as long with each trial that fails, up to the bound."""
    breaker, now, lengths = _opened(), 0.0, []
    for _ in range(6):
        opened_at = now
        while not breaker.tick(now):
            now += 0.5
        lengths.append(now - opened_at)
        assert breaker.failed(now) is True
    assert lengths == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


def test_past_ejections_fade() -> None:
    """Each window of nothing but successes takes one off."""
    breaker, now = _opened(), 5.0
    breaker.tick(now)
    assert breaker.failed(now) is True  # the second time: ten seconds
    now = 15.0
    assert breaker.tick(now) is True
    breaker.succeeded()
    for _ in range(3):
        now += SETTINGS.outlier_window_s
        breaker.tick(now)
        breaker.succeeded()
    for _ in range(5):
        breaker.failed(now)
    assert (breaker.tick(now + 4.9), breaker.tick(now + 5.0)) == (False, True)


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ("fs" * 9, CLOSED),
        ("fs" * 10, CLOSED),
        ("sf" * 10, OPEN),
        ("ssf" * 20, CLOSED),
    ],
    ids=["too few to judge", "half, then well", "half of twenty", "a third"],
)
def test_outliers(outcomes: str, state: BreakerState) -> None:
    """Half of at least twenty requests in a window, judged when one fails."""
    breaker = Breaker(SETTINGS)
    breaker.tick(0.0)
    for outcome in outcomes:
        if outcome == "f":
            breaker.failed(1.0)
        else:
            breaker.succeeded()
    assert breaker.state is state


def test_window_ends() -> None:
    """Failures of another window do not count."""
    breaker, now = Breaker(SETTINGS), 0.0
    for _ in range(30):
        now += SETTINGS.outlier_window_s
        breaker.tick(now)
        breaker.succeeded()
        breaker.failed(now)
    assert breaker.state is CLOSED


_steps = st.lists(
    st.tuples(st.sampled_from(["tick", "succeeded", "failed"]), st.floats(0.0, 20.0)),
    max_size=200,
)


def _walk(steps: Iterable[tuple[str, float]]) -> Iterable[tuple[str, bool, float, Breaker]]:
    breaker, now = Breaker(SETTINGS), 0.0
    for name, passed_s in steps:
        now += passed_s
        before = breaker.state
        if name == "tick":
            changed = breaker.tick(now)
        elif name == "failed":
            changed = breaker.failed(now)
        else:
            changed = breaker.succeeded()
        is_renewed = name == "tick" and changed and before is HALF_OPEN
        assert changed == (breaker.state is not before) or is_renewed
        yield name, changed, now, breaker


@given(_steps)
def test_any_walk(steps: list[tuple[str, float]]) -> None:
    """Only failures open it, only time makes it half-open, only a success closes it."""
    state = CLOSED
    for name, changed, _, breaker in _walk(steps):
        if changed and breaker.state is not state:
            assert (state, name, breaker.state) in {
                (CLOSED, "failed", OPEN),
                (HALF_OPEN, "failed", OPEN),
                (OPEN, "tick", HALF_OPEN),
                (HALF_OPEN, "succeeded", CLOSED),
            }
        state = breaker.state


@given(_steps)
def test_trials_are_rare(steps: list[tuple[str, float]]) -> None:
    """However it goes, two trials of a breaker are at least `breaker_open_s` apart."""
    trials = [
        now
        for name, changed, now, breaker in _walk(steps)
        if name == "tick" and changed and breaker.state is HALF_OPEN
    ]
    assert all(
        later - earlier >= SETTINGS.breaker_open_s - 1e-6
        for earlier, later in itertools.pairwise(trials)
    )


def test_other_thresholds() -> None:
    """They hold for the next failure; what was counted before counts."""
    breaker = Breaker(SETTINGS)
    assert breaker.failed(0.0) is False
    breaker.configure(Resilience(breaker_failures=2, breaker_open_s=1.0))
    assert breaker.failed(0.0) is True
    assert breaker.tick(0.9) is False
    assert breaker.tick(1.0) is True
