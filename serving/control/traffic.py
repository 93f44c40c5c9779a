"""What gateways report of adapters: traffic served, and adapters that are asked for and cold.

Owns the interface between the internal routes and the reconciler's demand. Implemented by
`swapping.py`, which hands on to whatever decides placement.
"""

from __future__ import annotations

from typing import Protocol


class TrafficSink(Protocol):
    """Takes reports; both methods return at once and are called on the event loop."""

    def add(self, version: str, requests: int, tokens: int) -> None:
        """Count traffic that a version has served since the last report."""

    def ask(self, version: str) -> None:
        """A request waits for this version, which is ready nowhere."""
