"""Which index each replica has: its identity in the ledger and in every worker's tables.

One process decides for all workers, so that an index means the same replica in each of them. Called
by `serving/gateway/reload.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import ConfigError
from serving.gateway.shared_table import MAX_REPLICAS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serving.config import ReplicaConfig


class ReplicaIndexes:
    """Indexes in use, and those of replicas that are gone.

    Invariant: an index goes to another replica only when no fresh one is left, the longest unused
    first, and never while a request is charged to it.
    """

    def __init__(self, replicas: Sequence[ReplicaConfig]) -> None:
        """Numbers the first fleet from 0."""
        self._known = {replica: index for index, replica in enumerate(replicas)}
        self._current = tuple(replicas)

    def assign(
        self, replicas: Sequence[ReplicaConfig], is_idle: Callable[[int], bool]
    ) -> tuple[int, ...]:
        """Indexes of a new fleet, in its order.

        Args:
            replicas: The new fleet; one that was there before gets its index back.
            is_idle: Whether no request of any worker is charged to an index.

        Raises:
            ConfigError: If no index is left; nothing changes.
        """
        known = dict(self._known)
        retired = [one for one in known if one not in replicas and one not in self._current]
        # Those that leave with this change may still be chosen by workers that lag behind.
        for replica in replicas:
            if replica in known:
                continue
            index = len(known)
            if index >= MAX_REPLICAS:
                index = self._take_over(known, retired, is_idle)
            known[replica] = index
        # The order of retirement is the order in `known`: those in use go to its end.
        self._known = {one: at for one, at in known.items() if one not in replicas} | {
            one: known[one] for one in replicas
        }
        self._current = tuple(replicas)
        return tuple(known[replica] for replica in replicas)

    @staticmethod
    def _take_over(
        known: dict[ReplicaConfig, int],
        retired: list[ReplicaConfig],
        is_idle: Callable[[int], bool],
    ) -> int:
        for replica in retired:
            if is_idle(known[replica]):
                retired.remove(replica)
                return known.pop(replica)
        raise ConfigError(
            f"replicas: {MAX_REPLICAS} addresses are in use or still busy; restart the gateway"
        )
