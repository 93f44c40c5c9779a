"""How much of each adapter version was served since the control plane last took a report.

Pure: reads the workers' tables, remembers what has been reported. Called by `control_follower.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from serving.gateway.adapter_metrics import Totals, totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.gateway.shared_table import SharedTable


class TrafficReport:
    """The difference between what was counted and what was reported."""

    def __init__(self, gateway: str, tables: Sequence[SharedTable]) -> None:
        """Starts from now: what an earlier gateway left in the tables, it has reported.

        Args:
            gateway: Its name.
            tables: Of all workers.
        """
        self._gateway = gateway
        self._tables = tables
        self._reported = totals(tables)
        self._pending: dict[str, Totals] = {}

    def body(self) -> bytes | None:
        """The next report as JSON, or None if nothing was served; `taken` ends it."""
        self._pending = totals(self._tables)
        served = {}
        for version, now in self._pending.items():
            before = self._reported.get(version, Totals(0.0, 0.0))
            if now.requests < before.requests:
                before = Totals(0.0, 0.0)  # its row was given away meanwhile, and made again
            requests, tokens = now.requests - before.requests, now.tokens - before.tokens
            if requests > 0 or tokens > 0:
                served[version] = {"requests": int(requests), "tokens": int(max(0.0, tokens))}
        if not served:
            return None
        return msgspec.json.encode({"gateway": self._gateway, "versions": served})

    def taken(self) -> None:
        """The control plane has the report."""
        self._reported = self._pending
