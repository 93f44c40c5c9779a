"""When a replica that answers probes is still not to be trusted with requests.

A circuit breaker a replica, with two ways to open: failures in a row, and a share of failures far above
the fleet's (outlier ejection). It closes through one request on trial. Pure: time is an argument, and
what the fleet does about it is `registry.py`'s business.

Sources: Nygard, "Release It!" (circuit breaker); Envoy, "Outlier detection" (consecutive errors,
success rate, ejection time that grows with each ejection).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.config import Resilience


class BreakerState(Enum):
    """Whether requests go to a replica."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"  # one request is let through and decides


class Breaker:
    """The breaker of one replica.

    Attributes:
        state: Read by the registry after each call that returns True.
    """

    __slots__ = (
        "_failures_in_row",
        "_num_ejections",
        "_open_until",
        "_settings",
        "_window_failures",
        "_window_requests",
        "_window_until",
        "state",
    )

    def __init__(self, settings: Resilience) -> None:
        self._settings = settings
        self.state = BreakerState.CLOSED
        self._failures_in_row = 0
        self._num_ejections = 0
        self._open_until = 0.0
        self._window_until = 0.0
        self._window_requests = 0
        self._window_failures = 0

    def configure(self, settings: Resilience) -> None:
        """Takes other thresholds; what has been counted stays, an ejection under way ends as it was set."""
        self._settings = settings

    def succeeded(self) -> bool:
        """A request was answered; closes a half-open breaker.

        Returns:
            Whether the state changed.
        """
        self._failures_in_row = 0
        self._window_requests += 1
        # An open one is not closed by what was under way when it opened: its time decides.
        if self.state is not BreakerState.HALF_OPEN:
            return False
        self.state = BreakerState.CLOSED
        return True

    def failed(self, now: float) -> bool:
        """A request failed by the replica's fault; may open the breaker.

        Args:
            now: `time.monotonic()`.

        Returns:
            Whether the state changed.
        """
        settings = self._settings
        self._failures_in_row += 1
        self._window_requests += 1
        self._window_failures += 1
        if self.state is BreakerState.HALF_OPEN:
            return self._open(now)
        is_outlier = (
            self._window_requests >= settings.outlier_min_requests
            and self._window_failures >= settings.outlier_failure_ratio * self._window_requests
        )
        if self.state is BreakerState.CLOSED and (
            self._failures_in_row >= settings.breaker_failures or is_outlier
        ):
            return self._open(now)
        return False

    def _open(self, now: float) -> bool:
        settings = self._settings
        open_s = settings.breaker_open_s * 2.0 ** min(self._num_ejections, 16)
        self._open_until = now + min(open_s, settings.breaker_max_open_s)
        self._num_ejections += 1
        self._failures_in_row = 0
        self.state = BreakerState.OPEN
        return True

    def tick(self, now: float) -> bool:
        """Lets time pass: an open breaker becomes half-open, a window ends, past ejections fade.

        A trial may end without a verdict (its client left, it was refused as too much): after
        `breaker_open_s` a half-open breaker is due for another, and says so by True.

        Args:
            now: `time.monotonic()`.

        Returns:
            Whether the state changed, or a half-open breaker may let another request through.
        """
        if now >= self._window_until:
            self._window_until = now + self._settings.outlier_window_s
            if self._window_requests and not self._window_failures:
                self._num_ejections = max(0, self._num_ejections - 1)
            self._window_requests = self._window_failures = 0
        if self.state is not BreakerState.CLOSED and now >= self._open_until:
            self._open_until = now + self._settings.breaker_open_s
            self.state = BreakerState.HALF_OPEN
            return True
        return False
