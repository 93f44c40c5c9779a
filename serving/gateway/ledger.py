"""Outstanding tokens of each replica: charged when a replica is chosen, settled at the end.

One accounting path for every endpoint. What a worker charged is visible to all workers, so that a
choice weighs the whole gateway's load and not only its own share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.gateway.shared_table import SharedTable
    from serving.routing.snapshot import Replica


class Ledger:
    """Charges of this worker, and their sum over all workers."""

    def __init__(self, own: SharedTable, others: Sequence[SharedTable] = ()) -> None:
        """Starts with nothing charged: what a dead predecessor left in its table is void."""
        self._own = own.outstanding_tokens
        self._others = [table.outstanding_tokens for table in others]
        for index in range(len(self._own)):
            self._own[index] = 0.0

    def charge(self, replica_index: int, cost_tokens: int) -> None:
        """Adds a request's cost to its replica."""
        self._own[replica_index] += cost_tokens

    def settle(self, replica_index: int, cost_tokens: int) -> None:
        """Takes the same cost off again."""
        self._own[replica_index] -= cost_tokens

    def is_idle(self, replica_index: int) -> bool:
        """Whether no request of any worker is charged to a replica."""
        tables = [self._own, *self._others]
        return not any(outstanding[replica_index] for outstanding in tables)

    def outstanding_tokens(self, replicas: Sequence[Replica]) -> list[float]:
        """Load of each of `replicas` over all workers, in tokens, in their order."""
        own = self._own
        if not self._others:
            return [own[replica.index] for replica in replicas]
        return [
            own[replica.index] + sum([other[replica.index] for other in self._others])
            for replica in replicas
        ]
