"""The control plane as one ASGI app: its parts made, wired, started and ended.

Owns the order of start and end. Never listens (`server.py` does). Made by `server.py` and by tests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio.to_thread
from fastapi import FastAPI

from adapters.intake import Intake
from adapters.locations import Location
from adapters.store import AdapterStore
from serving.control.acks import GatewayAcks
from serving.control.aliases import Aliases
from serving.control.auth import TokenAuth
from serving.control.context import Control
from serving.control.database import Database
from serving.control.engine_view import FleetEngines
from serving.control.error_answers import install_handlers
from serving.control.errors import DatabaseUnavailable
from serving.control.leadership import Leadership
from serving.control.metrics import ControlMetrics
from serving.control.migrate import migrate
from serving.control.placements import DatabaseLedger
from serving.control.publisher import Publisher
from serving.control.registration import Registration
from serving.control.registry import Registry
from serving.control.request_scope import BodyLimit, Measured, RequestId
from serving.control.routes import adapters, aliases, audit, health, internal, replicas, uploads
from serving.control.swapping import Swapping
from serving.control.uploads import Uploads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serving.control.settings import ControlSettings

logger = logging.getLogger(__name__)

START_S = 60.0
START_RETRY_S = 1.0
LEFTOVER_S = 3600.0
OPENAPI_PATH = "/admin/v1/openapi.json"


def create_app(settings: ControlSettings, *, is_acting: bool = True) -> FastAPI:
    """Return the app; its lifespan opens the database, follows it, and acts on the replicas.

    Args:
        settings: All of it.
        is_acting: False leaves the replicas alone, for tests of what surrounds that.

    Raises:
        ConfigError: If a base model's folder is not one.
    """
    engines, metrics = FleetEngines(settings), ControlMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings.database)
        try:
            await _migrated(database)
            control, swapping = _assemble(settings, database, engines, metrics)
            app.state.control = control
            await control.publisher.refresh()
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(control.publisher.run())]
                if is_acting:
                    tasks.append(group.create_task(control.leadership.run(swapping.act)))
                yield
                for task in tasks:
                    task.cancel()
        finally:
            database.close()

    app = FastAPI(
        title="Headrace control plane",
        version="1",
        summary="Adapters, aliases and the fleet that serves them.",
        openapi_url=OPENAPI_PATH,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    for module in (uploads, adapters, aliases, replicas, audit, internal, health):
        app.include_router(module.router)
    install_handlers(app)
    limits = settings.limits

    def max_bytes(method: str, path: str) -> int:
        is_upload = method == "POST" and path.startswith("/admin/v1/adapters/")
        return limits.max_upload_bytes if is_upload else limits.max_json_bytes

    # The last added runs first: an id for every answer, then the token, then the body.
    app.add_middleware(BodyLimit, max_bytes=max_bytes)
    app.add_middleware(TokenAuth, token=settings.token.get_secret_value())
    app.add_middleware(Measured, metrics=metrics)
    app.add_middleware(RequestId)
    return app


def _assemble(
    settings: ControlSettings,
    database: Database,
    engines: FleetEngines,
    metrics: ControlMetrics,
) -> tuple[Control, Swapping]:
    store = AdapterStore(Location(settings.store))
    intake = Intake(settings.state_dir / "staging", settings.limits.intake)
    intake.remove_leftovers(LEFTOVER_S, time.time())
    names = Aliases(database, engines, len(settings.replicas))
    acks = GatewayAcks(settings.gateway_ttl_s, settings.gateway_grace_s)
    ledger = DatabaseLedger(database)
    swapping = Swapping(settings, database, ledger, store, intake, acks, engines, metrics)
    control = Control(
        settings=settings,
        database=database,
        publisher=Publisher(database, settings.poll_s),
        acks=acks,
        registry=Registry(database),
        aliases=names,
        registration=Registration(database, store, names, engines),
        uploads=Uploads(settings, intake),
        ledger=ledger,
        engines=engines,
        traffic=swapping,
        metrics=metrics,
        leadership=Leadership(database),
        wake=swapping.wake,
    )
    return control, swapping


async def _migrated(database: Database) -> None:
    """Migrate as soon as the database answers."""
    end_s = time.monotonic() + START_S
    while True:
        try:
            await anyio.to_thread.run_sync(migrate, database)
        except DatabaseUnavailable as error:
            if time.monotonic() > end_s:
                raise
            logger.warning("database does not answer yet", extra={"cause": error.__cause__})
            await asyncio.sleep(START_RETRY_S)
        else:
            return
