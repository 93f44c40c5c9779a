"""Migrations, and what happens while the database is away."""

from __future__ import annotations

import multiprocessing
import threading
from typing import TYPE_CHECKING

import pytest
from alembic import command
from control_plane import BASE, adapter, running, settings_of, wait
from sqlalchemy import exc, inspect, text

from serving.control.database import Database, state
from serving.control.migrate import config, migrate
from serving.control.tables import Base

if TYPE_CHECKING:
    from pathlib import Path

    from control_plane import ControlPlane
    from postgres_server import Postgres


def test_migrations_make_what_the_tables_say(database_url: str) -> None:
    """From empty, applied twice, down and up again; nothing is left for a new migration."""
    database = Database(database_url)
    for _ in range(2):
        migrate(database)
    with database.write() as session:
        command.check(config(session.connection()))
        names = set(inspect(session.connection()).get_table_names())
    assert names == {*Base.metadata.tables, "alembic_version"}
    with database.write() as session:
        command.downgrade(config(session.connection()), "base")
        assert inspect(session.connection()).get_table_names() == ["alembic_version"]
    migrate(database)
    database.close()


def start(url: str) -> str:
    """What a starting process does; returns the epoch that it sees."""
    database = Database(url)
    migrate(database)
    with database.read() as session:
        epoch = state(session).epoch
    database.close()
    return epoch


def test_processes_that_start_together(database_url: str) -> None:
    """Four processes migrate one empty database at once: all see the same epoch."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        epochs = pool.map(start, [database_url] * 4)
        pool.close()
        pool.join()
    assert len(set(epochs)) == 1


@pytest.mark.parametrize(
    "change", ["UPDATE audit_events SET action = 'x'", "DELETE FROM audit_events"]
)
def test_audit_is_append_only(control: ControlPlane, change: str) -> None:
    """The database itself refuses to change or delete an event."""
    control.call("PUT", "/admin/v1/aliases/help", 201, json={"target": BASE})
    with (
        pytest.raises(exc.DBAPIError, match="audit events are never changed"),
        control.parts.database.write() as session,
    ):
        session.execute(text(change))
    assert len(control.get("/admin/v1/audit")["data"]) == 1


def test_lora_ids_are_never_given_again(control: ControlPlane, tmp_path: Path) -> None:
    """A version that was deleted keeps its number; the next gets a new one."""
    first = control.push("a", adapter(tmp_path))["version"]
    control.call("DELETE", f"/admin/v1/adapters/a/versions/{first['digest']}", 200)
    second = control.push("a", adapter(tmp_path, 1))["version"]
    assert (first["lora_id"], second["lora_id"]) == (1, 2)


def test_serves_from_memory_while_the_database_is_away(
    postgres: Postgres, tmp_path: Path, base_folder: Path
) -> None:
    """Changes and lists are 503, the snapshot and health go on; all works again by itself."""
    url = postgres.new_database()
    with running(settings_of(tmp_path / "state", base_folder, database_url=url)) as control:
        control.call("PUT", "/admin/v1/aliases/help", 201, json={"target": BASE})
        known = control.snapshot()
        assert known is not None
        postgres.stop()
        try:
            wait(lambda: control.get("/healthz")["status"] == "degraded")
            put = {"json": {"target": BASE}}
            error = control.refused("PUT", "/admin/v1/aliases/more", 503, **put)
            assert error["code"] == "database_unavailable"
            assert "127.0.0.1" not in error["message"]
            assert control.client.get("/admin/v1/adapters").headers["retry-after"] == "2"
            assert control.snapshot() == known
            assert control.snapshot(epoch=known.epoch, after=known.version, wait_s=0.1) is None
            assert "headrace_control_database_up 0.0" in control.client.get("/metrics").text
        finally:
            postgres.start()
        wait(lambda: control.get("/healthz")["status"] == "ok")
        control.call("PUT", "/admin/v1/aliases/more", 201, json={"target": BASE})
        changed = control.snapshot()
        assert changed is not None
        assert set(changed.aliases) == {"help", "more"}
        assert changed.version == known.version + 1


def test_waits_for_the_database_at_start(
    postgres: Postgres, tmp_path: Path, base_folder: Path
) -> None:
    """A control plane that starts before its database comes up with it."""
    url = postgres.new_database()
    postgres.stop()
    late = threading.Timer(1.5, postgres.start)
    late.start()
    try:
        with running(settings_of(tmp_path / "state", base_folder, database_url=url)) as control:
            assert control.get("/admin/v1/adapters")["data"] == []
    finally:
        late.join()
