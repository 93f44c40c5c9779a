"""Less than its share for a replica that has just come up: its caches are cold, its graphs not yet compiled."""

from __future__ import annotations

_MIN_SHARE = 0.1


def share(up_since: float, now: float, slow_start_s: float) -> float:
    """The share of its normal load that a replica should take, rising from 0.1 to 1.

    Linear, as in Envoy's slow start with an aggression of 1.

    Args:
        up_since: `time.monotonic()` of its coming up.
        now: The same clock.
        slow_start_s: Length of the ramp in seconds.
    """
    if now >= up_since + slow_start_s:
        return 1.0
    return max(_MIN_SHARE, (now - up_since) / slow_start_s)


def weighed(outstanding_tokens: float, cost_tokens: int, share_now: float) -> float:
    """Load to compare a warming replica by: as if what it has, and what comes, weighed more.

    Args:
        outstanding_tokens: Its load.
        cost_tokens: Of the request that is to be placed.
        share_now: From `share`.
    """
    return (outstanding_tokens + cost_tokens) / share_now - cost_tokens
