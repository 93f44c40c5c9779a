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
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from itertools import islice
from typing import TYPE_CHECKING, Any

from serving.errors import ConfigError
from serving.fleet.engine_metrics import EngineScraper, EngineTable
from serving.fleet.registry import FleetRegistry
from serving.gateway import adapter_metrics, metrics
from serving.gateway.adapter_metrics import AdapterMetrics
from serving.gateway.auth import ApiKeys
from serving.gateway.client import ClientConnection
from serving.gateway.cold_start import ColdStarts
from serving.gateway.control_follower import ControlFollower
from serving.gateway.control_relay import ControlExchange, control_target
from serving.gateway.cors import CorsRules
from serving.gateway.engine_request import EngineRequests
from serving.gateway.inference_id import InferenceIds
from serving.gateway.ledger import Ledger
from serving.gateway.listener import Listener
from serving.gateway.load_requests import LoadRequests
from serving.gateway.local import LocalRoutes
from serving.gateway.probe import ProbeKeys
from serving.gateway.reload import POLL_S, merged
from serving.gateway.shared_table import SharedTable
from serving.gateway.upstream import IDLE_S, UpstreamPool
from serving.routing import slow_start
from serving.routing.policy import Policy, least_outstanding_tokens
from serving.routing.residency import Residency
from serving.routing.retry_budget import RetryBudget

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Container, Coroutine, Sequence
    from pathlib import Path

    from serving.config import GatewayConfig
    from serving.config_file import ConfigSource
    from serving.gateway.control_follower import Received
    from serving.gateway.exchange import Exchange
    from serving.gateway.reload import Reload, Reloader
    from serving.routing.published import Published
    from serving.routing.snapshot import Adapter, Replica, Snapshot
    from serving.tracing.tracer import Tracer

log = logging.getLogger(__name__)

_SWEEP_S = 0.5
_SWEEP_SLICE = 256
"""Connections looked at without a pause: more at once would delay the tokens of others."""


class Worker:
    """State shared by the connections of one worker; everything here runs on one event loop.

    Attributes:
        snapshot: The fleet as routing sees it; replaced whole.
        date: Header line, renewed by the sweep.
        is_draining: Whether new requests on open connections are their last.
    """

    def __init__(
        self,
        config: GatewayConfig,
        index: int,
        metrics_dir: Path,
        replica_indexes: Sequence[int] | None = None,
    ) -> None:
        """Maps the tables of all workers; serves nothing yet.

        Args:
            config: Of the whole gateway.
            index: Which worker this is, from 0.
            metrics_dir: Folder of the shared tables; all workers use the same.
            replica_indexes: Of the replicas, the same in all workers; None numbers them from 0.
        """
        self.config = config
        self.api_keys = _keys_of(config)
        self.cors = None if config.cors is None else CorsRules(config.cors)
        self.control = control_target(config.control)
        self.is_first = index == 0
        self.inference_ids = InferenceIds()
        self.policy: Policy = least_outstanding_tokens

        self.exchanges: set[Exchange | ControlExchange] = set()
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
        self.adapter_tables: list[SharedTable] = []
        adapter_rows = None
        if config.control is not None:
            self.adapter_tables = adapter_metrics.open_tables(metrics_dir, config.workers)
            adapter_rows = AdapterMetrics(self.adapter_tables[index], self._published_versions)
        self.cold_starts = ColdStarts(self, adapter_rows)
        self.residency = Residency()
        self.local = LocalRoutes(self, int(time.time()))
        key = config.replica_api_key
        self._replica_key = key.get_secret_value() if key else None
        self.registry = FleetRegistry(
            config.replicas,
            config.aliases,
            self._replica_key,
            self._take_snapshot,
            config.resilience,
            self._last_heard_at,
            replica_indexes,
            is_controlled=config.control is not None,
        )
        self.retry_budget = RetryBudget(
            config.resilience.retry_ratio, config.resilience.min_retries_per_s
        )
        self.snapshot = self.registry.snapshot
        self.engine_requests = EngineRequests(self._replica_key)
        self._rotation = index
        self.engine_table = EngineTable(metrics_dir)
        self.tracer = self._make_tracer()
        self._stop = asyncio.Event()
        self._tasks: asyncio.TaskGroup
        self._beside: list[asyncio.Task[None]] = []
        # Of several workers the parent process follows, for all at once.
        self._follower = self._make_follower() if config.workers == 1 else None
        self._reloading: tuple[Reloader, ConfigSource] | None = None

    def _make_follower(self) -> ControlFollower | None:
        if self.config.control is None:
            return None

        async def take(received: Received) -> None:
            self.take_published(received.published)

        return ControlFollower(self.config, take, self.adapter_tables)

    def _make_tracer(self) -> Tracer | None:
        if self.config.tracing is None:
            return None
        # Imported where it is used only: the gateway runs without OpenTelemetry.
        from serving.tracing.tracer import Tracer

        return Tracer(self.config.tracing, self.metrics.worker)

    def _take_snapshot(self, snapshot: Snapshot) -> None:
        for index in self.snapshot.routable.keys() - snapshot.routable.keys():
            self.residency.forget(index)
        self.snapshot = snapshot
        self.cold_starts.snapshot_changed()

    def take_published(self, published: Published) -> None:
        """Takes what the control plane says now; requests from here on go by it."""
        self.registry.take_published(published)

    def _published_versions(self) -> Container[str]:
        adapters = self.snapshot.adapters
        return () if adapters is None else adapters.published.versions

    def _last_heard_at(self, replica: Replica) -> float:
        return max((x.heard_from(replica) for x in self.exchanges), default=float("-inf"))

    def choose(
        self, candidates: Sequence[Replica], cost_tokens: int, adapter: Adapter | None = None
    ) -> Replica:
        """The replica that takes a request, and is charged for it from now on.

        Args:
            candidates: Not empty.
            cost_tokens: Of the request.
            adapter: The published version that it is for.
        """
        loads = self.ledger.outstanding_tokens(candidates)
        if adapter is not None:
            loads = self.residency.weighed(loads, candidates, adapter)
        registry = self.registry
        if registry.warming:
            now = time.monotonic()
            shares = [registry.share(replica, now) for replica in candidates]
            loads = [
                slow_start.weighed(load, cost_tokens, share)
                for load, share in zip(loads, shares, strict=True)
            ]
        self._rotation += 1
        replica = candidates[self.policy(loads, self._rotation)]
        self.ledger.charge(replica.index, cost_tokens)
        if adapter is not None:
            self.residency.use(replica.index, adapter.version, replica.dialect.adapter_slots)
        if registry.trials:
            registry.report_chosen(replica)
        return replica

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
            if self._follower is not None:
                await self._follower.first_answer()
            listener = Listener(listening, self.config, lambda: ClientConnection(self))
            await listener.open()
            self._run_beside(listener.watch_certificate())
            if self._reloading is not None:
                self._run_beside(self._follow(*self._reloading))
            # What is alive now stays: the collector need not walk it, and delay tokens, ever again.
            gc.collect()
            gc.freeze()
            on_ready()
            try:
                await self._stop.wait()
            finally:
                listener.close()
            await self._drain()
        if self.tracer is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.tracer.close)

    def apply(self, source: ConfigSource, reload: Reload) -> None:
        """Takes new settings; connections and requests in flight go on as they are.

        Args:
            source: Reads the settings out of the bytes.
            reload: What the owner of the gateway decided.
        """
        if self.is_first:
            column = metrics.RELOADS_REFUSED if reload.contents is None else metrics.RELOADS
            self.metrics.worker.add(column, 1)
        if reload.contents is None:
            return
        try:
            config = merged(self.config, source.resolve(reload.contents))
            gone = self.registry.replace(config.replicas, reload.indexes, config.aliases)
        except ConfigError as error:
            log.error("worker cannot reload, it goes on as before: %s", error)
            return
        self.config = config
        self.api_keys = _keys_of(config)
        self.cors = None if config.cors is None else CorsRules(config.cors)
        self.pool.connect_timeout_s = config.timeouts.connect_s
        self.registry.configure(config.resilience)
        self.retry_budget.configure(
            config.resilience.retry_ratio, config.resilience.min_retries_per_s
        )
        for replica in gone:
            self.engine_requests.forget(replica)
            self.pool.drop(replica)
            self.residency.forget(replica.index)

    def reload_by(self, reloader: Reloader, source: ConfigSource) -> None:
        """Reloads by itself while it serves, in a gateway of one worker."""
        self._reloading = (reloader, source)

    async def _follow(self, reloader: Reloader, source: ConfigSource) -> None:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def asked() -> None:
            reloader.ask()
            woken.set()

        loop.add_signal_handler(signal.SIGHUP, asked)
        while True:
            woken.clear()
            # File systems can be slow: they are looked at beside the loop.
            reload = await loop.run_in_executor(None, reloader.poll)
            if reload is not None:
                self.apply(source, reload)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await woken.wait()

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
            self._tasks = tasks
            self.pool = UpstreamPool(tasks, self.config.timeouts.connect_s)
            self._run_beside(self.registry.run())
            self._run_beside(self._sweep())
            self._follow_control(tasks)
            if self.is_first:
                scraper = EngineScraper(
                    self.engine_table, self._replica_key, self.registry.scrape_targets
                )
                self._run_beside(scraper.run())
            yield
            for task in self._beside:
                task.cancel()

    def _follow_control(self, tasks: asyncio.TaskGroup) -> None:
        control = self.config.control
        if control is None:
            return
        self.cold_starts.load_requests = LoadRequests(control, tasks, self.cold_starts.fail)
        if self._follower is not None:
            if (stored := self._follower.load()) is not None:
                self.take_published(stored.published)
            self._run_beside(self._follower.run())

    def _run_beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs until the end of the drain."""
        self._beside.append(self._tasks.create_task(work))

    async def _drain(self) -> None:
        """Lets requests in flight end, within the deadline, then resets what is left."""
        deadline = time.monotonic() + self.config.timeouts.drain_s
        while self._is_sending and time.monotonic() < deadline:
            for connection in list(self.connections):
                connection.close_if_idle()
            await asyncio.sleep(0.05)
        self.cold_starts.give_up()
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
            self.cold_starts.check_deadlines(now)
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


def _keys_of(config: GatewayConfig) -> ApiKeys:
    keys = config.api_keys
    return ApiKeys(keys) if config.control is None else ProbeKeys(keys, config.control)
