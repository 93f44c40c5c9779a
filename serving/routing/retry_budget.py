"""How many retries the gateway may add to its traffic: a share of it, so that an outage is not multiplied."""

from __future__ import annotations

_RESERVE_S = 10.0


class RetryBudget:
    """A token bucket that requests fill and retries empty.

    Each request deposits `ratio` tokens and each retry takes one, so retries stay below that share of
    the traffic; a small rate beside it lets an idle gateway retry too. Source: Finagle's
    `RetryBudget` (20 % and 10 retries a second by default).
    """

    __slots__ = ("_at", "_balance", "_max_balance", "_min_per_s", "_ratio")

    def __init__(self, ratio: float, min_per_s: float) -> None:
        """Starts with what ten idle seconds allow.

        Args:
            ratio: Retries for each request, 0 to 1.
            min_per_s: Retries a second that are always allowed.
        """
        self._ratio = ratio
        self._min_per_s = min_per_s
        self._max_balance = min_per_s * _RESERVE_S + 100.0 * ratio
        self._balance = min_per_s * _RESERVE_S
        self._at = 0.0

    def configure(self, ratio: float, min_per_s: float) -> None:
        """Takes other rates; what is left of the balance stays, within the new bound.

        Args:
            ratio: Retries for each request, 0 to 1.
            min_per_s: Retries a second that are always allowed.
        """
        self._ratio = ratio
        self._min_per_s = min_per_s
        self._max_balance = min_per_s * _RESERVE_S + 100.0 * ratio
        self._balance = min(self._balance, self._max_balance)

    def deposit(self) -> None:
        """A request has come."""
        balance = self._balance + self._ratio
        self._balance = balance if balance < self._max_balance else self._max_balance

    def withdraw(self, now: float) -> bool:
        """Whether a retry may be made now; if so, it is paid for.

        Args:
            now: `time.monotonic()`.
        """
        if self._at:
            refilled = self._balance + (now - self._at) * self._min_per_s
            self._balance = min(refilled, self._max_balance)
        self._at = now
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True
