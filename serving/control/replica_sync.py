"""Keeps one replica's adapters as they are wanted: looks, records, does the next step, looks again.

Owns the driving of one `HotSwap`: what its engine is asked and told, and what is recorded of that. The
ledger is always told before the engine is told to unload, and before clients are let in. Never decides
what belongs where (`reconcile.py` does), and never waits for another replica.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from adapters.errors import AdapterError
from adapters.golden import judge
from adapters.hot_swap import HotSwap
from adapters.swap_slot import Phase, Step, StepKind
from serving.control.errors import DatabaseUnavailable
from serving.control.probe import ProbeFailed, ProbeWaits
from serving.control.swap_rows import changes, slot_of
from serving.engines.lora import LoraFailure, redacted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapters.golden import Fingerprint
    from serving.control.ledger import PlacementRow, WantedVersion
    from serving.control.sync_parts import SyncParts
    from serving.engines.lora import LoraEngine, LoraTarget

logger = logging.getLogger(__name__)

SILENT_AFTER = 3
"""Listings in a row without an answer after which nothing is placed on a replica."""


class ReplicaSync:
    """One replica.

    Attributes:
        swap: Its state machine.
        base: Public name of its base model, once it has said it.
        gpu_slots: Adapters that one batch may mix.
        released: Version → when its files may go, by the clock; None is when the replica restarts.
    """

    def __init__(
        self,
        target: LoraTarget,
        engine: LoraEngine,
        parts: SyncParts,
        *,
        gpu_slots: int,
        max_registered: int,
    ) -> None:
        """Start with nothing known of it.

        Args:
            target: The replica.
            engine: How its kind is told.
            parts: What all replicas share.
            gpu_slots: Adapters that one batch may mix, unless the engine says otherwise.
            max_registered: Adapters that it may know at once, unless the engine says otherwise.
        """
        self.target = target
        self.engine = engine
        self.swap = HotSwap(max_registered, parts.chance, parts.rules)
        self.base: str | None = None
        self.gpu_slots = gpu_slots
        self.released: dict[str, float | None] = {}
        self._parts = parts
        self._known: Mapping[str, WantedVersion] = {}
        self._has_orders = False
        self._recorded: dict[str, PlacementRow] = {}
        self._wake = asyncio.Event()
        self._under_way: set[StepKind] = set()
        self._base_answer: Fingerprint | None = None
        self._placed_at_s: dict[str, float] = {}
        self._shown: set[str] = set()
        self._num_outcomes = 0
        self._num_silent = 0
        self._look_at_s = 0.0

    @property
    def name(self) -> str:
        """`host:port`."""
        return self.target.name

    def restore(self, rows: Sequence[PlacementRow]) -> None:
        """Take over what was recorded before this process started."""
        for row in rows:
            self._recorded[row.version] = row
            self.swap.restore(row.version, slot_of(row))

    def want(self, versions: frozenset[str], known: Mapping[str, WantedVersion]) -> None:
        """Have these versions there."""
        self._known = known
        self._has_orders = True
        now_s = self._parts.clock()
        for version in versions - self.swap.wanted:
            self._placed_at_s[version] = now_s
        is_new = versions != self.swap.wanted
        self.swap.want(versions)
        self.swap.forget(known.keys())
        if is_new:
            self.wake()

    def retry(self, version: str) -> None:
        """Give a version that has failed another chance."""
        self.swap.retry(version)
        self.wake()

    def recall(self, row: PlacementRow) -> None:
        """Take note that somebody else has changed a row."""
        self._recorded[row.version] = row

    def wake(self) -> None:
        """Look at once."""
        self._look_at_s = 0.0
        self._wake.set()

    async def run(self) -> None:
        """Keep at it until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    wait_s = await self._round(group)
                except DatabaseUnavailable:
                    wait_s = self._parts.limits.tick_s  # said by the publisher already
                except Exception:  # a fault with one replica must not end the others
                    logger.exception(
                        "replica's reconciliation failed", extra={"replica": self.name}
                    )
                    wait_s = self._parts.limits.tick_s
                try:
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
                except TimeoutError:
                    continue
                self._wake.clear()

    # One round.

    async def _round(self, group: asyncio.TaskGroup) -> float:
        """Look, record, begin whatever can begin; returns how long nothing will be due."""
        parts = self._parts
        if parts.clock() >= self._look_at_s:
            self._look_at_s = parts.clock() + parts.limits.tick_s
            await self._look()
        if not self._has_orders:
            return parts.limits.tick_s  # What it has may well be wanted: nobody has said yet.
        await self._record()
        while (step := self.swap.next_step(parts.clock(), self._free_kinds())) is not None:
            self.swap.begin(step)
            await self._record()
            if step.kind != "drain":
                self._under_way.add(step.kind)
                group.create_task(self._perform(step))
        now_s = parts.clock()
        due_s = self.swap.next_time_s(now_s)
        wait_s = parts.limits.tick_s if due_s is None else min(parts.limits.tick_s, due_s - now_s)
        return max(0.001, wait_s)

    def _free_kinds(self) -> set[StepKind]:
        """One step of a kind at a time; SGLang's unloads hold up its loads."""
        free: set[StepKind] = {"load", "probe", "drain", "unload"}
        free -= self._under_way
        if self.engine.kind == "sglang" and self._under_way & {"load", "unload"}:
            free -= {"load", "unload"}
        return free

    async def _look(self) -> None:
        num_outcomes, was_up = self._num_outcomes, self.swap.is_up
        try:
            listing = await self.engine.listing(self.target)
        except ConnectionRefusedError:
            if was_up or any(s.phase is not Phase.LOADING for s in self.swap.slots.values()):
                self._went_down()
            return
        except OSError:
            # It may serve on, cut off from here only: what is routed there stays.
            self._num_silent += 1
            if self._num_silent >= SILENT_AFTER:
                self.swap.is_silent()
            return
        if listing.adapters is None and self._num_silent >= SILENT_AFTER:
            self._went_down()  # It lists nothing that could tell whether it has restarted.
        self._num_silent = 0
        self.base = listing.base
        self.gpu_slots = self.gpu_slots if listing.gpu_slots is None else listing.gpu_slots
        if listing.max_registered is not None:
            self.swap.max_registered = listing.max_registered
        if num_outcomes == self._num_outcomes and self.swap.observe(listing.adapters):
            self._base_answer = None
            self.released.clear()
        if not was_up:
            self._parts.changed()

    def _went_down(self) -> None:
        logger.warning("replica is down", extra={"replica": self.name})
        self.swap.went_down()
        self._base_answer = None
        self.released.clear()
        self._parts.changed()

    async def _record(self) -> None:
        """Bring the ledger up to date; nothing goes on before it is."""
        rows, gone = changes(self.name, self.swap.slots, self._recorded, self._known)
        ledger = self._parts.ledger
        for row in rows:
            await self._parts.in_ledger(lambda row=row: ledger.record(row))  # type: ignore[misc]
            before = self._recorded.get(row.version)
            self._recorded[row.version] = row
            self._show(row.version, is_ready=row.phase == "ready")
            if before is None or before.phase != row.phase:
                self._parts.changed()
        for version in gone:
            await self._parts.in_ledger(
                lambda version=version: ledger.forget(self.name, version)  # type: ignore[misc]
            )
            del self._recorded[version]
            self._show(version, is_ready=False)
            self._parts.changed()

    def _show(self, version: str, *, is_ready: bool) -> None:
        resident = self._parts.metrics.resident
        if is_ready:
            self._shown.add(version)
            resident.labels(self.name, version).set(1)
        elif version in self._shown:
            self._shown.discard(version)
            resident.remove(self.name, version)

    # Steps.

    async def _perform(self, step: Step) -> None:
        try:
            if step.kind == "load":
                await self._load(step)
            elif step.kind == "probe":
                await self._probe(step.version)
            else:
                await self._unload(step.version)
        except Exception:  # a fault in one step must not end the replica's others
            logger.exception("step failed", extra={"replica": self.name, "version": step.version})
            until_s = self._parts.clock() + self._parts.rules.longest_s
            reason = "The control plane failed at this step: see its log."
            if step.version in self.swap.slots:
                self.swap.waits(step.version, reason, until_s)
        finally:
            self._num_outcomes += 1
            self._under_way.discard(step.kind)
            self._wake.set()

    async def _load(self, step: Step) -> None:
        version, metrics = step.version, self._parts.metrics
        began_s = time.monotonic()
        path = ""
        try:
            wanted = self._known[version]
            if refusal := wanted.unloadable.get(self.engine.kind):
                raise LoraFailure(refusal, is_terminal=True)
            path = await self._parts.fetch(wanted.manifest, verify=step.verify)
            await self._ask_base()
            await self.engine.load(self.target, version, path)
        except (LoraFailure, AdapterError, KeyError) as error:
            failure = error if isinstance(error, LoraFailure) else _failure(error)
            metrics.loads.labels(self.name, "failed").inc()
            logger.warning(
                "load failed",
                extra={"replica": self.name, "version": version, "reason": failure.reason},
            )
            self.swap.load_failed(
                version,
                failure.reason,
                self._parts.clock(),
                is_terminal=failure.is_terminal,
                may_have=failure.may_have,
            )
            return
        took_s = time.monotonic() - began_s
        metrics.loads.labels(self.name, "loaded").inc()
        metrics.load_seconds.labels(self.name).observe(took_s)
        self.released.pop(version, None)
        self.swap.loaded(version, path, took_s)

    async def _ask_base(self) -> None:
        """Once a life of the engine, before its first adapter, where that can be.

        vLLM 0.32 on CPUs answers base requests by the adapter in its last slot while it works on an
        adapter's request too (`lora/ops/torch_ops` takes slot -1 for the last one).
        """
        if self._base_answer is not None or self.base is None:
            return
        try:
            self._base_answer = await self._parts.prober.ask(self.name, self.base)
        except (ProbeWaits, ProbeFailed) as error:
            logger.info("base not probed", extra={"replica": self.name, "reason": str(error)})

    async def _probe(self, version: str) -> None:
        parts, swap, now_s = self._parts, self.swap, self._parts.clock
        wanted = self._known.get(version)
        if wanted is None:
            swap.waits(version, "It is not known.", now_s() + parts.limits.probe_wait_s)
            return
        await parts.gateways.follow(parts.limits.follow_s)
        has_effect = not wanted.may_do_nothing
        try:
            if has_effect:
                await self._ask_base()
            if has_effect and self._base_answer is None:
                raise ProbeWaits("The base model could not be asked for its answer yet.")
            got = await parts.prober.ask(self.name, version)
        except ProbeWaits as error:
            swap.waits(version, str(error), now_s() + parts.limits.probe_wait_s)
            return
        except ProbeFailed as error:
            parts.metrics.probe_failures.labels(self.name).inc()
            swap.probe_failed(version, str(error), now_s())
            return
        await self._decide(wanted, got, has_effect=has_effect)

    async def _decide(self, wanted: WantedVersion, got: Fingerprint, *, has_effect: bool) -> None:
        parts, version, kind = self._parts, wanted.version, self.engine.kind
        record = await parts.in_ledger(lambda: parts.ledger.golden(version, kind))
        verdict = judge(got, self._base_answer, record, parts.tolerances, has_effect=has_effect)
        if not verdict.is_proven:
            parts.metrics.probe_failures.labels(self.name).inc()
            logger.warning(
                "probe answered by other weights",
                extra={"replica": self.name, "version": version, "reason": verdict.reason},
            )
            self.swap.mismatched(version, verdict.reason or "")
            return
        if record is None:
            await parts.in_ledger(lambda: parts.ledger.record_golden(version, kind, got))
        now_s = parts.clock()
        self.swap.proven(version, now_s)
        if (placed_at_s := self._placed_at_s.pop(version, None)) is not None:
            parts.metrics.ready_seconds.labels(self.name).observe(max(0.0, now_s - placed_at_s))

    async def _unload(self, version: str) -> None:
        parts, swap = self._parts, self.swap
        has_acked = True
        if swap.slots[version].phase is Phase.DRAINING:
            has_acked = await parts.gateways.follow(parts.limits.drain_s)
        if not swap.still_unwanted(version):
            return
        # Its files stay for whatever may still name it: until the longest request has ended or, where
        # a gateway did not follow, until the engine restarts.
        self.released[version] = parts.clock() + parts.limits.linger_s if has_acked else None
        try:
            await self.engine.unload(self.target, version)
        except LoraFailure as error:
            swap.unload_failed(version, error.reason, parts.clock())
            return
        parts.metrics.evictions.labels(self.name).inc()
        swap.unloaded(version)


def _failure(error: Exception) -> LoraFailure:
    if isinstance(error, KeyError):
        return LoraFailure("The version no longer exists.")
    return LoraFailure(redacted(str(error)))
