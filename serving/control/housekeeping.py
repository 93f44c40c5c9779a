"""Removes what nobody names any more: files in the store and the node's cache, folders of broken uploads.

Owns what counts as named, and how often it is looked for. Never deletes a row. Run by the leader.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import anyio.to_thread
from sqlalchemy import select, union

from adapters.errors import StoreError
from adapters.garbage import collect
from serving.control.errors import DatabaseUnavailable
from serving.control.tables import Adapter, Placed, Version

if TYPE_CHECKING:
    from collections.abc import Collection

    from adapters.garbage import Collected
    from adapters.intake import Intake
    from adapters.node_cache import NodeCache
    from adapters.store import AdapterStore
    from serving.control.database import Database
    from serving.control.reconcile import Reconciler
    from serving.control.settings import ControlSettings

logger = logging.getLogger(__name__)


class Housekeeping:
    """The cleaning of one control plane."""

    def __init__(
        self,
        settings: ControlSettings,
        database: Database,
        store: AdapterStore,
        cache: NodeCache | None,
        intake: Intake,
        reconciler: Reconciler,
    ) -> None:
        """Know what is cleaned.

        Args:
            settings: How often, and after what grace.
            database: Whose rows name versions.
            store: Of the files.
            cache: Of this node; None if it has none.
            intake: Whose staging folder it is.
            reconciler: Knows which versions' files an engine may still read.
        """
        self._settings = settings
        self._database = database
        self._store = store
        self._cache = cache
        self._intake = intake
        self._reconciler = reconciler

    async def run(self) -> None:
        """Clean now and then until cancelled."""
        while True:
            await asyncio.sleep(self._settings.garbage_interval_s)
            if not self._reconciler.may_collect():
                continue
            in_use = self._reconciler.in_use()
            try:
                await anyio.to_thread.run_sync(self.clean, in_use, time.time())
            except (StoreError, DatabaseUnavailable) as error:
                logger.warning("garbage could not be collected", extra={"reason": error})

    def clean(self, in_use: Collection[str], now_s: float) -> Collected:
        """Remove what nobody has named for the time of grace.

        Args:
            in_use: Versions whose files an engine may still read.
            now_s: Seconds since 1970.

        Raises:
            StoreError: If the store or the disk fails.
            DatabaseUnavailable: If the database does not answer.
        """
        grace_s = self._settings.garbage_grace_s
        self._intake.remove_leftovers(grace_s, now_s)
        named = self._named() | set(in_use)
        collected = collect(self._store, self._cache, named, grace_s=grace_s, now_s=now_s)
        logger.info(
            "garbage collected",
            extra={
                "versions": len(collected.removed_versions),
                "digests": len(collected.removed_digests),
                "evicted": len(collected.evicted),
            },
        )
        return collected

    def _named(self) -> set[str]:
        """Versions that are registered, and those that a replica still has."""
        registered = (
            select(Version.name)
            .join(Adapter, Adapter.id == Version.adapter_id)
            .where(Version.deleted_at_s.is_(None), Adapter.deleted_at_s.is_(None))
        )
        with self._database.read() as session:
            return set(session.scalars(union(registered, select(Placed.version))))
