"""One control plane of several acts and has the gateways; another takes over when it goes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from control_plane import BASE, running, settings_of, wait

from serving.control.database import Database
from serving.control.leadership import Leadership
from serving.control.migrate import migrate

if TYPE_CHECKING:
    from pathlib import Path

    from postgres_server import Postgres


def test_standby_takes_over(database_url: str, tmp_path: Path, base_folder: Path) -> None:
    """The second answers the API but no gateway, until the first has ended."""

    def settings(name: str):
        return settings_of(tmp_path / name, base_folder, database_url=database_url, replicas=[])

    with running(settings("a"), is_acting=True) as first:
        wait(lambda: first.client.get("/readyz").status_code == 200)
        wait(lambda: first.parts.engines.replicas() == [])
        with running(settings("b"), is_acting=True) as second:
            wait(lambda: second.client.get("/readyz").status_code == 503)
            error = second.refused("GET", "/internal/v1/snapshot?gateway=g", 503)
            assert error["code"] == "not_leading"
            second.call("PUT", "/admin/v1/aliases/help", 201, json={"target": BASE})
            published = first.snapshot(wait_s=10)
            assert published is not None
            wait(lambda: "help" in first.parts.publisher.current.published.aliases)
            first.stop()
            wait(lambda: second.client.get("/readyz").status_code == 200)
            taken = second.snapshot()
            assert taken is not None
            assert taken.aliases["help"].target == BASE


async def test_lead_is_lost_with_the_database(postgres: Postgres) -> None:
    """The leader's work is cancelled when its session goes, and starts anew with the database."""
    database = Database(postgres.new_database())
    migrate(database)
    started, ended = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def act() -> None:
        started.release()
        try:
            await asyncio.Event().wait()
        finally:
            ended.release()

    leadership = Leadership(database)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        leading = group.create_task(leadership.run(act))
        await started.acquire()
        postgres.stop()
        try:
            await ended.acquire()
            assert not leadership.is_standby
        finally:
            postgres.start()
        await started.acquire()
        leading.cancel()
    database.close()


async def test_work_that_fails_starts_anew(tmp_path: Path) -> None:
    """An unexpected error of the leader's work ends neither the process nor the lead."""
    database = Database(f"sqlite:///{tmp_path / 'control.db'}")
    migrate(database)
    again = asyncio.Event()
    num_calls = 0

    async def act() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("a fault")
        again.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        leading = group.create_task(Leadership(database).run(act))
        await again.wait()
        leading.cancel()
    assert num_calls == 2
    database.close()
