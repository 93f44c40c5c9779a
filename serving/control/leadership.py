"""Which of several control planes on one database acts on the replicas: one at a time.

Owns the lock and the watch over it: a file's lock beside SQLite, an advisory lock of a PostgreSQL
session otherwise; both go with the process that held them. All of them answer requests; only the
leader reconciles and collects garbage. Called by `app.py`.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio.to_thread
from sqlalchemy import text

from adapters.file_lock import try_lock
from serving.control.database import LEADER_LOCK, mapped_errors
from serving.control.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy.engine import Connection

    from adapters.file_lock import FileLock
    from serving.control.database import Database

logger = logging.getLogger(__name__)

LOOK_S = 1.0


class LeadershipLost(Exception):
    """Another process may act now."""


class _Held(Protocol):
    """A lock that is held; both methods may block."""

    def check(self) -> None:
        """Raise `DatabaseUnavailable` once it may have been lost."""

    def release(self) -> None:
        """Give it up."""


class Leadership:
    """This process's part in it.

    Attributes:
        is_standby: Whether another process leads, as far as is known: while the database is away, who
            led goes on answering gateways.
    """

    def __init__(self, database: Database) -> None:
        """Want the lead of this database's control planes."""
        self._database = database
        self.is_standby = False

    async def run(self, act: Callable[[], Coroutine[None, None, None]]) -> None:
        """Act whenever, and for as long as, this process leads; until cancelled.

        Args:
            act: Cancelled when the lead is lost, and called again when it is had again.
        """
        while True:
            held = await self._acquired()
            self.is_standby = False
            logger.info("leads")
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(act())
                    group.create_task(_watch(held))
            except* LeadershipLost:
                logger.warning("lost the lead: the database went away")
            except* Exception:  # it starts anew, from what is recorded
                logger.exception("the leader's work failed")
                await asyncio.sleep(LOOK_S)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(held.release)

    async def _acquired(self) -> _Held:
        while True:
            try:
                held = await anyio.to_thread.run_sync(_try, self._database)
            except DatabaseUnavailable:
                held = None  # the publisher has said so
            else:
                self.is_standby = held is None
            if held is not None:
                return held
            await asyncio.sleep(LOOK_S)


async def _watch(held: _Held) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            await anyio.to_thread.run_sync(held.check)
        except DatabaseUnavailable as error:
            raise LeadershipLost from error


def _try(database: Database) -> _Held | None:
    file = database.engine.url.database
    if database.is_sqlite and file:
        lock = try_lock(Path(f"{file}.leader"))
        return None if lock is None else _OfFile(lock)
    with mapped_errors():
        connection = database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            query = text("SELECT pg_try_advisory_lock(:key)")
            if connection.execute(query, {"key": LEADER_LOCK}).scalar_one():
                return _OfSession(connection)
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        connection.close()
    return None


class _OfFile:
    """A file's lock."""

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    def check(self) -> None:
        """It cannot be lost."""

    def release(self) -> None:
        """Give it up."""
        self._lock.release()


class _OfSession:
    """A session's advisory lock."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def check(self) -> None:
        """Ask the session whether it lives."""
        with mapped_errors():
            self._connection.execute(text("SELECT 1"))

    def release(self) -> None:
        """Close the session: its lock goes with it."""
        self._connection.invalidate()
        self._connection.close()
