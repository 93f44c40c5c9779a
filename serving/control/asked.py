"""What gateways report of adapters, kept for placement: `traffic.TrafficSink`.

Owns decayed demand, and the bounded list of cold versions that requests wait for. Belongs to the event
loop. Read by `reconcile.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.demand import Demand

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapters.demand import Rate
    from serving.control.adapter_metrics import AdapterMetrics


class Asked:
    """Takes reports of traffic and of cold versions.

    Attributes:
        wake: Called when a cold version is asked for.
    """

    def __init__(
        self, metrics: AdapterMetrics, clock: Callable[[], float], max_asks: int = 256
    ) -> None:
        """Start with nothing asked for.

        Args:
            metrics: Where dropped questions are counted.
            clock: Unix time in seconds.
            max_asks: Cold versions that may wait at once; one more is dropped and counted.
        """
        self.wake: Callable[[], None] = lambda: None
        self._demand = Demand()
        self._metrics = metrics
        self._clock = clock
        self._max_asks = max_asks
        self._cold: dict[str, None] = {}

    def add(self, version: str, requests: int, tokens: int) -> None:
        """Count traffic that a version has served since the last report."""
        self._demand.add(version, requests, tokens, self._clock())

    def ask(self, version: str) -> None:
        """A request waits for this version, which is ready nowhere."""
        if version in self._cold:
            return
        if len(self._cold) >= self._max_asks:
            self._metrics.overflows.inc()
            return
        self._cold[version] = None
        self._demand.add(version, 1, 0, self._clock())
        self.wake()

    def take_cold(self) -> list[str]:
        """Return the cold versions that were asked for since the last time, in that order."""
        taken = list(self._cold)
        self._cold.clear()
        return taken

    def rate(self, version: str) -> Rate:
        """Return what a version is asked for now."""
        return self._demand.rate(version, self._clock())
