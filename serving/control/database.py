"""The database: connections, transactions, and the number of the published state.

Owns how SQLite and PostgreSQL are opened, the one-writer rule, the epoch and the snapshot version.
Never knows what the tables mean. Used by everything beside this file that keeps state.

One writer at a time on both databases: SQLite by `BEGIN IMMEDIATE`, PostgreSQL by an advisory lock
held for the transaction. Writes are few and short, and what a writer has read stays true until its
commit, so that checks such as "no alias points at this version" need no locks of their own.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, create_engine, event, exc, make_url, select, text, update
from sqlalchemy.orm import Session

from serving.control.errors import DatabaseUnavailable
from serving.control.tables import STATE_ROW, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import URL, Connection

WRITER_LOCK = 0x6865_6164_0001
MIGRATION_LOCK = 0x6865_6164_0002
LEADER_LOCK = 0x6865_6164_0003
BUSY_S = 10
CONNECT_S = 3
# Routes run in 40 threads; the reconciler, the publisher and the leader have some of their own.
_POOL: dict[str, Any] = {"pool_size": 10, "max_overflow": 40, "pool_timeout": 5}
STATEMENT_S = 30
_IS_WRITER = "headrace_is_writer"
_IS_PUBLISHED = "headrace_is_published"


class Database:
    """Transactions on one database. Every method may block; call it from a worker thread.

    Attributes:
        engine: For migrations and the leader's lock.
        published: Snapshot version of the last change that this process committed.
    """

    def __init__(self, url: str) -> None:
        """Prepare connections; none is opened yet.

        Args:
            url: `sqlite:///FILE` or `postgresql://…`.
        """
        self.engine = _open(_normal(url))
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        reader = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reader = self.engine.execution_options(**reader)
        self._writer = self.engine.execution_options(**{_IS_WRITER: True})
        self.published = 0
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    def on_commit(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every commit of a writer, in the writer's thread."""
        self._listeners.append(listener)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One consistent look at the state.

        Raises:
            DatabaseUnavailable: If the database does not answer.
        """
        with mapped_errors(), Session(self._reader) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One change: committed at the end, undone on an error. The only writer while it lasts.

        Raises:
            DatabaseUnavailable: If the database does not answer, or the lock is not had in time.
        """
        with mapped_errors(), Session(self._writer) as session, session.begin():
            session.connection()
            yield session
            session.flush()
            version = _count(session) if session.info.get(_IS_PUBLISHED) else None
        if version is not None:
            with self._lock:
                self.published = max(self.published, version)
        for listener in self._listeners:
            listener()

    def close(self) -> None:
        """Close the connections that are not in use."""
        self.engine.dispose()


def publish(session: Session) -> None:
    """Mark the change as one that gateways have to know: its commit has a new snapshot version."""
    session.info[_IS_PUBLISHED] = True


def state(session: Session) -> State:
    """Return the row that identifies the database."""
    return session.scalars(select(State).where(State.id == STATE_ROW)).one()


def _count(session: Session) -> int:
    counted = update(State).where(State.id == STATE_ROW)
    counted = counted.values(snapshot_version=State.snapshot_version + 1)
    return session.execute(counted.returning(State.snapshot_version)).scalar_one()


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Translate what the driver says; a broken rule of the tables stays what it is.

    Raises:
        DatabaseUnavailable: If the database does not answer.
    """
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        raise DatabaseUnavailable from error
    except exc.DBAPIError as error:
        if error.connection_invalidated:
            raise DatabaseUnavailable from error
        raise


def _normal(url: str) -> URL:
    """The URL with the driver that is installed."""
    parsed = make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def _open(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_S}, **_POOL)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    options = (
        f"-c lock_timeout={BUSY_S * 1000} -c statement_timeout={STATEMENT_S * 1000}"
        f" -c idle_in_transaction_session_timeout={STATEMENT_S * 1000}"
    )
    engine = create_engine(
        url,
        connect_args={
            "connect_timeout": CONNECT_S,
            "options": options,
            "application_name": "headrace-control",
            # A host that vanished is noticed within half a minute.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": STATEMENT_S * 1000,
        },
        **_POOL,
        pool_pre_ping=True,
        pool_recycle=1800,
    )
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver's own transactions begin late and deferred: a reader that then writes would fail
    # instead of waiting. `_begin_sqlite` begins them.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    # FULL: what was answered with 201 survives a power cut; NORMAL could lose it in WAL mode.
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    is_writer = connection.get_execution_options().get(_IS_WRITER)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get(_IS_WRITER):
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITER_LOCK})
