"""The reconciler and the cleaning, as the leader runs them.

Owns how they are made from the settings, anew for each time that this process leads. Never decides
anything of theirs. Called by `app.py`; gateways' reports pass through it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from adapters.node_cache import NodeCache
from serving.control.adapter_metrics import AdapterMetrics
from serving.control.housekeeping import Housekeeping
from serving.control.node_files import NodeFiles
from serving.control.probe import GatewayProber
from serving.control.reconcile import Reconciler, ReplicaSpec
from serving.control.sync_parts import FollowingGateways
from serving.engines.lora import LoraTarget
from serving.gateway.tls import replica_context

if TYPE_CHECKING:
    from adapters.intake import Intake
    from adapters.store import AdapterStore
    from serving.config import ReplicaConfig
    from serving.control.acks import GatewayAcks
    from serving.control.database import Database
    from serving.control.engine_view import FleetEngines
    from serving.control.metrics import ControlMetrics
    from serving.control.placements import DatabaseLedger
    from serving.control.settings import ControlSettings


class Swapping:
    """Hot swap, while this process leads; a `TrafficSink` that hands on to it, or drops."""

    def __init__(
        self,
        settings: ControlSettings,
        database: Database,
        ledger: DatabaseLedger,
        store: AdapterStore,
        intake: Intake,
        acks: GatewayAcks,
        engines: FleetEngines,
        metrics: ControlMetrics,
    ) -> None:
        """Know the parts; nothing runs before `act`."""
        self._settings = settings
        self._database = database
        self._ledger = ledger
        self._store = store
        self._intake = intake
        self._acks = acks
        self._engines = engines
        self._metrics = AdapterMetrics(metrics.registry)
        self._reconciler: Reconciler | None = None

    async def act(self) -> None:
        """Reconcile and clean until cancelled."""
        settings = self._settings
        token = settings.token.get_secret_value()
        async with GatewayProber(settings.gateway_url, token) as prober:
            reconciler = Reconciler(
                [self._spec(replica) for replica in settings.replicas],
                ledger=self._ledger,
                files=NodeFiles(self._store, self._cache),
                gateways=FollowingGateways(self._acks, self._database),
                prober=prober,
                metrics=self._metrics,
            )
            cleaning = Housekeeping(
                settings, self._database, self._store, self._cache(), self._intake, reconciler
            )
            self._reconciler = reconciler
            self._engines.watch(reconciler)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(reconciler.run())
                    group.create_task(cleaning.run())
            finally:
                self._reconciler = None
                self._engines.watch(None)

    def wake(self) -> None:
        """Have the reconciler look at once."""
        if self._reconciler is not None:
            self._reconciler.wake()

    def add(self, version: str, requests: int, tokens: int) -> None:
        """Count traffic that a version has served since the last report."""
        if self._reconciler is not None:
            self._reconciler.asked.add(version, requests, tokens)

    def ask(self, version: str) -> None:
        """A request waits for this version, which is ready nowhere."""
        if self._reconciler is not None:
            self._reconciler.asked.ask(version)

    def _cache(self) -> NodeCache:
        return NodeCache(self._settings.cache, max_bytes=self._settings.cache_max_bytes)

    def _spec(self, replica: ReplicaConfig) -> ReplicaSpec:
        settings = self._settings
        key = settings.replica_api_key
        target = LoraTarget(
            name=replica.name,
            host=replica.host,
            port=replica.port,
            api_key=None if key is None else key.get_secret_value(),
            tls=replica_context(replica),
        )
        return ReplicaSpec(target, replica.kind, settings.max_loras, settings.max_cpu_loras)
