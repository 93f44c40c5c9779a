"""Brings the database's tables to what the code needs, once, however many processes start.

Owns the lock around migrations and the first row. Called at start by `app.py`.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from sqlalchemy import text

from adapters.file_lock import locked
from serving.control.database import MIGRATION_LOCK, mapped_errors
from serving.control.tables import STATE_ROW, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Connection

    from serving.control.database import Database

LOCK_S = 60.0
MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(database: Database) -> None:
    """Apply the migrations that the database lacks, and give it an epoch if it is new.

    Raises:
        DatabaseUnavailable: If it does not answer.
        StoreError: If another process has been at it for a minute.
    """
    if database.is_sqlite and (file := database.engine.url.database):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    with _alone(database):
        with database.write() as session:
            command.upgrade(config(session.connection()), "head")
        with database.write() as session:
            if session.get(State, STATE_ROW) is None:
                epoch = secrets.token_hex(16)
                session.add(State(id=STATE_ROW, epoch=epoch, snapshot_version=1))


def config(connection: Connection) -> Config:
    """Return Alembic's configuration for this connection."""
    settings = Config()
    settings.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    settings.attributes["connection"] = connection
    return settings


@contextmanager
def _alone(database: Database) -> Iterator[None]:
    """Keeps other starting processes waiting."""
    file = database.engine.url.database
    if database.is_sqlite and file:
        with locked(Path(f"{file}.lock"), LOCK_S):
            yield
        return
    # Of the session, not of the transaction: migrations commit on the way.
    with (
        mapped_errors(),
        database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
    ):
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
