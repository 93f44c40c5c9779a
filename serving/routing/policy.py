"""Which replica takes a request: pure functions of what is known at that moment.

A policy sees the candidates and their load and returns an index; it does no I/O, keeps no state and
charges nothing (the caller does), so policies can be replayed on recorded or simulated traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Policy = Callable[[Sequence[float], int], int]
"""`(outstanding tokens of each candidate, rotation) → index of the chosen one`."""


def least_outstanding_tokens(outstanding_tokens: Sequence[float], rotation: int) -> int:
    """The candidate with the fewest tokens outstanding.

    Tokens instead of requests: one 8,000-token prompt weighs as much as a hundred short ones.

    Args:
        outstanding_tokens: Load of each candidate; not empty.
        rotation: A number that grows with each request. Among equals it decides, so that an idle
            fleet is used evenly.
    """
    lowest = min(outstanding_tokens)
    start = rotation % len(outstanding_tokens)
    for index in range(start, len(outstanding_tokens)):
        if outstanding_tokens[index] == lowest:
            return index
    return outstanding_tokens.index(lowest)
