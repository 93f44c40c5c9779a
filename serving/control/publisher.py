"""Keeps the newest snapshot in memory and wakes whoever waits for the next one.

Owns the encoded snapshot, the long polls' wake-up and the look for changes that other processes
committed. Never writes state. Runs in the app's task group; `routes/snapshot.py` and
`routes/aliases.py` wait here. The database may be away: the last snapshot is served on.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio.to_thread
from anyio import CapacityLimiter

from serving.control.errors import DatabaseUnavailable
from serving.control.snapshot_reader import read_published
from serving.routing.published import Published, encode

if TYPE_CHECKING:
    from serving.control.database import Database

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """One published state, with its JSON made once for all who ask."""

    published: Published
    body: bytes

    @property
    def version(self) -> int:
        """Its number."""
        return self.published.version

    @property
    def epoch(self) -> str:
        """The database that the number belongs to."""
        return self.published.epoch


class Publisher:
    """The newest snapshot. All methods but the commit's listener belong to the event loop.

    Attributes:
        is_fresh: Whether the database answered the last look.
        is_closing: Whether the process ends: nobody waits any more.
    """

    def __init__(self, database: Database, poll_s: float) -> None:
        """Listen to the database's commits; `run` does the rest.

        Args:
            database: Where the state is.
            poll_s: How often changes by other processes are looked for.
        """
        self._database = database
        self._poll_s = poll_s
        self._limiter = CapacityLimiter(
            1
        )  # its own thread: a full pool of others cannot hold it up
        self._wake = asyncio.Event()
        self._published = asyncio.Event()
        self._committed = asyncio.Event()
        self._snapshot = Snapshot(Published(), encode(Published()))
        self._loop = asyncio.get_running_loop()
        self.is_fresh = False
        self.is_closing = False
        database.on_commit(self._on_commit)

    @property
    def current(self) -> Snapshot:
        """The newest one that this process has read."""
        return self._snapshot

    async def refresh(self) -> Snapshot:
        """Read the state if it has changed, and wake the waiters.

        Raises:
            DatabaseUnavailable: If the database does not answer.
        """
        read = await anyio.to_thread.run_sync(self._read, limiter=self._limiter)
        self.is_fresh = True
        if read is not None:
            self._snapshot = read
            woken, self._published = self._published, asyncio.Event()
            woken.set()
        woken, self._committed = self._committed, asyncio.Event()
        woken.set()
        return self._snapshot

    def close(self) -> None:
        """Have every wait end now: the process is ending."""
        self.is_closing = True
        self._published.set()
        self._committed.set()

    async def run(self) -> None:
        """Follow the database until cancelled."""
        while True:
            try:
                await self.refresh()
            except DatabaseUnavailable as error:
                if self.is_fresh:
                    logger.warning("database is away", extra={"cause": error.__cause__})
                self.is_fresh = False
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def after(self, epoch: str, version: int, wait_s: float) -> Snapshot | None:
        """Wait for a snapshot other than the one that the caller has.

        Args:
            epoch: The caller's.
            version: The caller's.
            wait_s: How long, in seconds.

        Returns:
            The newest snapshot, or None if nothing changed in time.
        """
        try:
            async with asyncio.timeout(wait_s):
                while self._is_known(epoch, version) and not self.is_closing:
                    await self._published.wait()
        except TimeoutError:
            pass
        return None if self._is_known(epoch, version) else self._snapshot

    async def reached(self, version: int, wait_s: float) -> None:
        """Wait until the snapshot is at least at this number, at most `wait_s` seconds."""
        try:
            async with asyncio.timeout(wait_s):
                while self._snapshot.version < version and not self.is_closing:
                    await self._published.wait()
        except TimeoutError:
            return

    async def committed(self, wait_s: float) -> None:
        """Wait until this process has read the state again, at most `wait_s` seconds."""
        try:
            async with asyncio.timeout(wait_s):
                await self._committed.wait()
        except TimeoutError:
            return

    def _is_known(self, epoch: str, version: int) -> bool:
        """Also true before the first read: there is nothing to tell yet."""
        current = self._snapshot
        return not current.epoch or (current.epoch == epoch and current.version == version)

    def _read(self) -> Snapshot | None:
        current = self._snapshot
        with self._database.read() as session:
            published = read_published(session, (current.epoch, current.version))
        return None if published is None else Snapshot(published, encode(published))

    def _on_commit(self) -> None:
        """In a writer's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)
