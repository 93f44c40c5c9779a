"""One gateway worker: an event loop, its listening socket, and what its connections share.

Started by `server.py`, in the process of the command or in one of its own. Workers know of each
other only through the shared tables.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from contextlib import asynccontextmanager
from email.utils import formatdate
from itertools import islice
from typing import TYPE_CHECKING

from serving.fleet.registry import FleetRegistry
from serving.gateway import metrics
from serving.gateway.auth import ApiKeys
from serving.gateway.client import ClientConnection
from serving.gateway.inference_id import InferenceIds
from serving.gateway.ledger import Ledger
from serving.gateway.local import LocalRoutes
from serving.gateway.shared_table import SharedTable
from serving.gateway.upstream import IDLE_S, UpstreamPool
from serving.routing.policy import Policy, least_outstanding_tokens

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from serving.config import GatewayConfig
    from serving.gateway.exchange import Exchange
    from serving.routing.snapshot import Replica, Snapshot

log = logging.getLogger(__name__)

_SWEEP_S = 0.5
_SWEEP_SLICE = 256
"""Connections looked at without a pause: more at once would delay the tokens of others."""
_BACKLOG = 4096


class Worker:
    """State shared by the connections of one worker; everything here runs on one event loop.

    Attributes:
        snapshot: The fleet as routing sees it; replaced whole.
        date: Header line, renewed by the sweep.
        is_draining: Whether new requests on open connections are their last.
    """

    def __init__(self, config: GatewayConfig, index: int, metrics_dir: Path) -> None:
        """Maps the tables of all workers; serves nothing yet.

        Args:
            config: Of the whole gateway.
            index: Which worker this is, from 0.
            metrics_dir: Folder of the shared tables; all workers use the same.
        """
        self.config = config
        self.api_keys = ApiKeys(config.api_keys)
        self.inference_ids = InferenceIds()
        self.policy: Policy = least_outstanding_tokens

        self.exchanges: set[Exchange] = set()
        self.connections: set[ClientConnection] = set()
        self.is_draining = False
        self.date = b""
        self.pool: UpstreamPool
        self.tables = [
            SharedTable(metrics_dir / f"worker-{number}.f64", metrics.NUM_COLUMNS)
            for number in range(config.workers)
        ]
        own = self.tables[index]
        self.metrics = metrics.Metrics(own)
        self.ledger = Ledger(own, [table for table in self.tables if table is not own])
        self.local = LocalRoutes(self, int(time.time()))
        key = config.replica_api_key
        self._replica_key = key.get_secret_value() if key else None
        self.registry = FleetRegistry(
            config.replicas, config.aliases, self._replica_key, self._take_snapshot
        )
        self.snapshot = self.registry.snapshot
        self._request_prefixes: dict[tuple[int, str], bytes] = {}
        self._rotation = index
        self._stop = asyncio.Event()

    def _take_snapshot(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def next_rotation(self) -> int:
        """A number that grows with each choice of a replica."""
        self._rotation += 1
        return self._rotation

    def request_prefix(self, replica: Replica, path: str) -> bytes:
        """Request head for a replica up to the value of the header that carries our request id."""
        prefix = self._request_prefixes.get((replica.index, path))
        if prefix is None:
            bearer = f"authorization: Bearer {self._replica_key}\r\n" if self._replica_key else ""
            host = f"[{replica.host}]" if ":" in replica.host else replica.host
            prefix = (
                (
                    f"POST {path} HTTP/1.1\r\nhost: {host}:{replica.port}\r\n"
                    f"content-type: application/json\r\n{bearer}"
                ).encode()
                + replica.dialect.request_id_header()
                + b": "
            )
            self._request_prefixes[replica.index, path] = prefix
        return prefix

    async def serve(self, listening: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serves until `stop`, then drains.

        Args:
            listening: Bound socket; the worker owns it from here on.
            on_ready: Called once requests are accepted.

        Cancellation: ends at once, connections are reset.
        """
        self._renew_date()
        async with self._background():
            await self.registry.first_round()
            loop = asyncio.get_running_loop()
            server = await loop.create_server(
                lambda: ClientConnection(self), sock=listening, backlog=_BACKLOG
            )
            # What is alive now stays: the collector need not walk it, and delay tokens, ever again.
            gc.collect()
            gc.freeze()
            on_ready()
            try:
                await self._stop.wait()
            finally:
                server.close()
            await self._drain()

    def stop(self) -> None:
        """Begins the shutdown: unready, no new connections, drain, end."""
        self.is_draining = True
        self._stop.set()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT call `stop`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    @asynccontextmanager
    async def _background(self) -> AsyncIterator[None]:
        """Owns the tasks that run beside the connections."""
        async with asyncio.TaskGroup() as tasks:
            self.pool = UpstreamPool(tasks, self.config.timeouts.connect_s)
            running = [tasks.create_task(self.registry.run()), tasks.create_task(self._sweep())]
            yield
            for task in running:
                task.cancel()

    async def _drain(self) -> None:
        """Lets requests in flight end, within the deadline, then resets what is left."""
        deadline = time.monotonic() + self.config.timeouts.drain_s
        while self._is_sending and time.monotonic() < deadline:
            for connection in list(self.connections):
                connection.close_if_idle()
            await asyncio.sleep(0.05)
        if self.exchanges:
            log.warning("drain deadline passed", extra={"requests": len(self.exchanges)})
        else:
            # One more turn, for last bytes that sit in write buffers.
            await asyncio.sleep(0.05)
        for connection in list(self.connections):
            connection.abort()
        self.pool.close_idle(float("inf"))

    @property
    def _is_sending(self) -> bool:
        return bool(self.exchanges) or any(client.has_unsent for client in self.connections)

    async def _sweep(self) -> None:
        """Keeps the deadlines of all connections and requests, half a second's grain."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._renew_date()
            now = time.monotonic()
            self.pool.close_idle(now - IDLE_S)
            exchanges, connections = iter(list(self.exchanges)), iter(list(self.connections))
            while batch := list(islice(exchanges, _SWEEP_SLICE)):
                for exchange in batch:
                    exchange.check_deadlines(now)
                await asyncio.sleep(0)
            while idle := list(islice(connections, _SWEEP_SLICE)):
                for connection in idle:
                    connection.check_deadlines(now)
                await asyncio.sleep(0)

    def _renew_date(self) -> None:
        self.date = f"date: {formatdate(usegmt=True)}\r\n".encode()
