"""Keeps the fleet's adapters as the ledger wants them: who has what, which flips are due.

Owns one `ReplicaSync` a replica, the placement round and the flips. Never talks to an engine itself.
Made and run by the control plane's app.

A round reads the ledger, flips the aliases whose targets are proven on enough replicas, asks
`adapters/placement.py` what belongs where, and tells each replica. Replicas go on by themselves: one
that hangs holds up nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from typing import TYPE_CHECKING, NamedTuple

from adapters.placement import place_cold, plan
from adapters.placement_view import DEFAULT_LIMITS, Limits, ReplicaCapacity, VersionDemand
from adapters.swap_slot import Phase
from serving.control.asked import Asked
from serving.control.errors import DatabaseUnavailable
from serving.control.flips import Candidate, decide
from serving.control.ledger import PendingFlip, PlacementPhase, PlacementRow, WantedVersion
from serving.control.replica_sync import ReplicaSync
from serving.control.sync_parts import SyncLimits, SyncParts
from serving.engines.lora_sglang import SglangLora
from serving.engines.lora_tensorrt_llm import TensorrtLlmLora
from serving.engines.lora_vllm import VllmLora

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from serving.config import EngineKind
    from serving.control.adapter_metrics import AdapterMetrics
    from serving.control.ledger import Ledger
    from serving.control.probe import Prober
    from serving.control.sync_parts import AdapterFiles, Gateways
    from serving.engines.lora import LoraEngine, LoraTarget

logger = logging.getLogger(__name__)

FIRST_LOAD_S = 1.0
"""What a load is taken to last before one has been measured."""
_LEAVING = (Phase.DRAINING, Phase.UNLOADING)

ENGINES: Mapping[EngineKind, Callable[[], LoraEngine]] = {
    "vllm": VllmLora,
    "sglang": SglangLora,
    "tensorrt-llm": TensorrtLlmLora,
}


class ReplicaSpec(NamedTuple):
    """A replica as the settings describe it.

    Attributes:
        gpu_slots: Adapters that one batch may mix.
        max_registered: Adapters that it may know at once.
    """

    target: LoraTarget
    kind: EngineKind
    gpu_slots: int
    max_registered: int


class _State(NamedTuple):
    """What one round has read."""

    wanted: dict[str, WantedVersion]
    rows: Sequence[PlacementRow]
    flips: Sequence[PendingFlip]


class Reconciler:
    """The fleet's adapters.

    Attributes:
        replicas: Name → its synchronisation.
        asked: Where gateways report traffic; the app's `TrafficSink`.
    """

    def __init__(
        self,
        specs: Sequence[ReplicaSpec],
        *,
        ledger: Ledger,
        files: AdapterFiles,
        gateways: Gateways,
        prober: Prober,
        metrics: AdapterMetrics,
        limits: SyncLimits | None = None,
        placement: Limits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
        parts: Callable[[SyncParts], None] = lambda parts: None,
    ) -> None:
        """Start with nothing known.

        Args:
            specs: The fleet.
            ledger: What is wanted and recorded.
            files: Brings versions to where engines read them.
            gateways: Whether they follow.
            prober: Asks replicas through a gateway.
            metrics: Where it counts.
            limits: Deadlines and periods.
            placement: How eagerly placement moves versions.
            clock: Unix time in seconds.
            chance: Random numbers in [0, 1), for jitter.
            parts: Changes what all replicas share before they are made.
        """
        self._limits = limits or SyncLimits()
        self._parts = SyncParts(
            ledger, files, gateways, prober, metrics, chance, clock, self._limits
        )
        self._parts.in_use = self.in_use
        self._parts.changed = self.wake
        parts(self._parts)
        self._placement = placement
        self._clock = clock
        self._began_s = clock()
        self.asked = Asked(metrics, clock, self._limits.max_asks)
        self.asked.wake = self.wake
        self.replicas = {
            spec.target.name: ReplicaSync(
                spec.target,
                ENGINES[spec.kind](),
                self._parts,
                gpu_slots=spec.gpu_slots,
                max_registered=spec.max_registered,
            )
            for spec in specs
        }
        self._wake = asyncio.Event()
        self._aliased_at_s: dict[str, float] = {}
        self._last_plan: object = None
        self._plan_at_s = 0.0

    def wake(self) -> None:
        """Think it over at once: something has changed."""
        self._wake.set()

    def in_use(self) -> frozenset[str]:
        """Return the versions whose files have to stay on this node.

        Those that a replica has or is to have, and those that a request may still name.
        """
        now_s = self._clock()
        used: set[str] = set()
        for replica in self.replicas.values():
            used |= replica.swap.slots.keys() | replica.swap.wanted
            released = replica.released
            for version in [v for v, until_s in released.items() if (until_s or now_s) < now_s]:
                del released[version]
            used |= released.keys()
        return frozenset(used)

    def may_collect(self) -> bool:
        """Whether unused files may go: not before what an earlier process released is past use."""
        return self._clock() - self._began_s > self._limits.linger_s

    async def run(self) -> None:
        """Keep at it until cancelled."""
        try:
            await self._restore()
            async with asyncio.TaskGroup() as group:
                for replica in self.replicas.values():
                    group.create_task(replica.run())
                await self._rounds()
        finally:
            self._parts.close()

    async def _rounds(self) -> None:
        while True:
            try:
                await self._round()
            except DatabaseUnavailable:
                logger.debug("database is away")
            except Exception:  # the next round may have what this one lacked
                logger.exception("reconciliation failed")
            try:
                async with asyncio.timeout(self._limits.tick_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def _restore(self) -> None:
        """Read what was recorded; until that is known nothing can be done safely."""
        rows: Sequence[PlacementRow] | None = None
        while rows is None:
            try:
                rows = await self._parts.in_ledger(self._parts.ledger.placements)
            except DatabaseUnavailable:
                await asyncio.sleep(self._limits.tick_s)
        for name, replica in self.replicas.items():
            replica.restore([row for row in rows if row.replica == name])
        # When their aliases left them is not recorded: those that are ready stay warm from now on.
        now_s = self._clock()
        ready = (row.version for row in rows if row.phase is PlacementPhase.READY)
        self._aliased_at_s.update(dict.fromkeys(ready, now_s))

    async def _round(self) -> None:
        state = await self._parts.in_ledger(self._read)
        self._forgive(state.rows)
        for flip in state.flips:
            await self._flip(flip, state.wanted)
        now_s = self._clock()
        for version, one in state.wanted.items():
            if one.is_aliased or one.min_copies:
                self._aliased_at_s[version] = now_s
        for version in self._aliased_at_s.keys() - state.wanted.keys():
            del self._aliased_at_s[version]
        self._place(state.wanted, now_s)

    def _read(self) -> _State:
        ledger = self._parts.ledger
        wanted = {one.version: one for one in ledger.wanted()}
        return _State(wanted, ledger.placements(), ledger.pending_flips())

    def _forgive(self, rows: Sequence[PlacementRow]) -> None:
        """A retry that somebody asked for is a row that is to be tried and has no attempts."""
        for row in rows:
            replica = self.replicas.get(row.replica)
            if replica is None or row.phase is not PlacementPhase.RETRYING or row.num_attempts:
                continue
            slot = replica.swap.slots.get(row.version)
            if slot is not None and (slot.num_attempts or slot.phase is Phase.FAILED):
                replica.recall(row)
                replica.retry(row.version)

    # Flips.

    async def _flip(self, flip: PendingFlip, wanted: Mapping[str, WantedVersion]) -> None:
        target = wanted.get(flip.target)
        base = None if target is None else target.manifest.base.name
        candidates = [
            Candidate(name, one.engine.kind, one.swap.slots.get(flip.target))
            for name, one in self.replicas.items()
            if one.base is None or one.base == base
        ]
        decision = decide(flip, target, candidates)
        ledger = self._parts.ledger
        if decision.act == "flip":
            await self._parts.in_ledger(lambda: ledger.flip(flip.alias))
            logger.info("alias flipped", extra={"alias": flip.alias, "version": flip.target})
        elif decision.act == "fail":
            await self._parts.in_ledger(lambda: ledger.fail_flip(flip.alias, decision.reason))
            logger.warning("flip failed", extra={"alias": flip.alias, "reason": decision.reason})

    # Placement.

    def _place(self, wanted: Mapping[str, WantedVersion], now_s: float) -> None:
        cold = [version for version in self.asked.take_cold() if version in wanted]
        capacities = [self._capacity(one, wanted) for one in self.replicas.values() if one.base]
        demands = [self._demand(one, now_s) for one in wanted.values()]
        kept = [one for one in demands if self._is_kept(wanted[one.version], one, now_s)]
        inputs = (
            {one.version: one.min_copies for one in demands},
            {(one.name, one.is_healthy, one.unloadable) for one in capacities},
        )
        if inputs != self._last_plan or now_s >= self._plan_at_s:
            self._last_plan, self._plan_at_s = inputs, now_s + self._limits.placement_s
            desired = plan(kept, capacities, self._placement).desired
            for one in capacities:
                if one.is_healthy:
                    self.replicas[one.name].want(desired[one.name], wanted)
        for version in cold:
            self._place_cold(version, demands, wanted)

    def _place_cold(
        self, version: str, demands: Sequence[VersionDemand], wanted: Mapping[str, WantedVersion]
    ) -> None:
        """Load it now, where it costs least."""
        capacities = [self._capacity(one, wanted) for one in self.replicas.values() if one.base]
        asked = next(one for one in demands if one.version == version)
        place = place_cold(asked, demands, capacities, self._placement)
        if place is None:
            logger.warning("no room for a cold version", extra={"version": version})
            return
        replica = self.replicas[place.replica]
        replica.swap.hurry(version)
        evicted = frozenset[str]() if place.evict is None else {place.evict}
        replica.want((replica.swap.wanted - evicted) | {version}, wanted)

    def _demand(self, one: WantedVersion, now_s: float) -> VersionDemand:
        rate = self.asked.rate(one.version)
        loads_s = [
            slot.load_s
            for replica in self.replicas.values()
            if (slot := replica.swap.slots.get(one.version)) and slot.load_s is not None
        ]
        since_alias_s = now_s - self._aliased_at_s.get(one.version, -math.inf)
        return VersionDemand(
            version=one.version,
            base=one.manifest.base.name,
            requests_per_s=rate.requests_per_s,
            tokens_per_s=rate.tokens_per_s,
            rank=one.manifest.rank,
            size_bytes=one.manifest.size_bytes,
            load_s=sum(loads_s) / len(loads_s) if loads_s else FIRST_LOAD_S,
            min_copies=one.min_copies,
            idle_s=min(rate.idle_s, since_alias_s),
        )

    def _is_kept(self, one: WantedVersion, demand: VersionDemand, now_s: float) -> bool:
        """Whether it may be loaded: aliased, waited for, or used or aliased not long ago."""
        if one.is_aliased or one.min_copies:
            return True
        return demand.idle_s <= self._limits.keep_warm_s

    def _capacity(self, one: ReplicaSync, wanted: Mapping[str, WantedVersion]) -> ReplicaCapacity:
        swap = one.swap
        draining = {name for name, slot in swap.slots.items() if slot.phase in _LEAVING}
        failed = {name for name, slot in swap.slots.items() if slot.phase is Phase.FAILED}
        registered = {name for name, slot in swap.slots.items() if slot.holds_place}
        refused = {name for name, this in wanted.items() if one.engine.kind in this.unloadable}
        return ReplicaCapacity(
            name=one.name,
            base=one.base or "",
            gpu_slots=one.gpu_slots,
            max_registered=max(0, swap.max_registered - swap.num_foreign),
            resident=frozenset((swap.wanted | registered) - draining - failed - refused),
            unloadable=frozenset(failed | refused),
            draining=frozenset(draining),
            is_healthy=swap.is_up,
            load_tokens=0.0,
        )
