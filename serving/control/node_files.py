"""The node cache as the reconciler uses it: `AdapterFiles` for engines that share this node's disk.

Owns which instance of the cache is trusted: one that has not seen a version before reads and checks
its files. Called from worker threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from adapters.manifest import Manifest
    from adapters.node_cache import NodeCache
    from adapters.store import AdapterStore


class NodeFiles:
    """Fetches versions into a folder of this node."""

    def __init__(self, store: AdapterStore, make_cache: Callable[[], NodeCache]) -> None:
        """Know the store and how to open the cache.

        Args:
            store: Where versions come from.
            make_cache: Opens the cache; each instance checks what it first sees.
        """
        self._store = store
        self._make_cache = make_cache
        self._cache = make_cache()

    def fetch(self, manifest: Manifest, in_use: Collection[str], *, verify: bool) -> str:
        """Return the version's folder, downloaded if need be.

        Raises:
            StoreError: If it cannot be had.
        """
        cache = self._make_cache() if verify else self._cache
        return str(cache.fetch(self._store, manifest, in_use=in_use))
