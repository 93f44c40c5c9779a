"""Runs one simulated engine until it is told to stop. Called by `headrace bench engine` and by tests."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from benchmarks.engine_sim.connection import SimConnection
from benchmarks.engine_sim.engine import Engine
from benchmarks.engine_sim.kv_events import KvEventPublisher
from benchmarks.engine_sim.routes import Routes
from benchmarks.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from benchmarks.engine_sim.options import SimOptions

_BACKLOG = 4096


async def serve(options: SimOptions, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        options: How the engine is started.
        on_ready: Called with the URL once connections are taken.

    Raises:
        KvEventsUnavailable: If KV events are wanted and cannot be had.
        OSError: If the port cannot be bound.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with running(options) as url:
        on_ready(url)
        await stop.wait()


@asynccontextmanager
async def running(options: SimOptions) -> AsyncIterator[str]:
    """An engine that serves, by its URL.

    Args:
        options: How it is started; port 0 takes any.

    Raises:
        KvEventsUnavailable: If KV events are wanted and cannot be had.
        OSError: If the port cannot be bound.

    Resources:
        Closes sockets, connections and schedule on the way out; answers in flight are cut off.
    """
    loop = asyncio.get_running_loop()
    with _engine(options, loop) as engine:
        routes = Routes(engine)
        connections: set[SimConnection] = set()
        server = await loop.create_server(
            lambda: SimConnection(routes, engine, connections),
            options.host,
            options.port,
            backlog=_BACKLOG,
        )
        try:
            host, port = server.sockets[0].getsockname()[:2]
            yield f"http://{host}:{port}"
        finally:
            server.close()
            for connection in list(connections):
                connection.abort()


@contextmanager
def _engine(options: SimOptions, loop: asyncio.AbstractEventLoop) -> Iterator[Engine]:
    publisher = None
    if options.kv_events is not None:
        publisher = KvEventPublisher(
            loop, options.host, options.kv_events, options.kv_events_replay
        )
    schedule = Schedule(loop)
    try:
        yield Engine(options, loop, schedule, publisher)
    finally:
        schedule.close()
        if publisher is not None:
            publisher.close()
