"""What every replica's reconciliation shares: ledger, files, gateways, probes and their bounds.

Owns the interfaces and the deadlines. Made once by `reconcile.py`, used by `replica_sync.py`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from adapters.golden import DEFAULT_TOLERANCES, Tolerances
from adapters.swap_slot import DEFAULT_RULES, RetryRules

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from adapters.manifest import Manifest
    from serving.control.acks import GatewayAcks
    from serving.control.adapter_metrics import AdapterMetrics
    from serving.control.database import Database
    from serving.control.ledger import Ledger
    from serving.control.probe import Prober

Result = TypeVar("Result")

NUM_LEDGER_THREADS = 4
NUM_FILE_THREADS = 4


class AdapterFiles(Protocol):
    """Brings versions to where engines read them; may block for as long as a download takes."""

    def fetch(self, manifest: Manifest, in_use: Collection[str], *, verify: bool) -> str:
        """Return the folder of a version, as the engines see it.

        Args:
            manifest: Of the version.
            in_use: Versions that must not make room for it.
            verify: Whether the files are to be read and checked even if they were before.

        Raises:
            AdapterError: If it cannot be had.
        """


class Gateways(Protocol):
    """The gateways, as far as they follow what is published."""

    async def follow(self, timeout_s: float) -> bool:
        """Wait until all that live have what was recorded so far; whether they do."""


class FollowingGateways:
    """`Gateways` by what they acknowledge."""

    def __init__(self, acks: GatewayAcks, database: Database) -> None:
        """Know who acknowledges what, and what was committed last."""
        self._acks = acks
        self._database = database

    async def follow(self, timeout_s: float) -> bool:
        """Wait until the live gateways have this process's last commit."""
        return await self._acks.wait(self._database.published, timeout_s)


@dataclass(frozen=True, slots=True)
class SyncLimits:
    """Deadlines and periods, in seconds.

    Attributes:
        tick_s: How often a replica is asked what it has.
        placement_s: How often placement is thought over.
        follow_s: How long a probe waits for the gateways to know the placement.
        drain_s: How long an unload waits for the gateways to have unrouted a version; those that
            have not until then are taken for dead or cut off.
        probe_wait_s: Until a probe that nobody could ask is tried again.
        linger_s: How long a version's files stay after it was unloaded: the longest request.
        keep_warm_s: How long a version stays loaded, where there is room, after its alias left it.
        max_asks: Cold versions that may be asked for at once.
    """

    tick_s: float = 1.0
    placement_s: float = 5.0
    follow_s: float = 2.0
    drain_s: float = 30.0
    probe_wait_s: float = 2.0
    linger_s: float = 3600.0
    keep_warm_s: float = 600.0
    max_asks: int = 256


@dataclass
class SyncParts:
    """The shared parts.

    Attributes:
        in_use: Versions whose files must stay; set by the reconciler.
        changed: Called when a version becomes ready, fails or is lost.
    """

    ledger: Ledger
    files: AdapterFiles
    gateways: Gateways
    prober: Prober
    metrics: AdapterMetrics
    chance: Callable[[], float]
    clock: Callable[[], float]
    limits: SyncLimits = field(default_factory=SyncLimits)
    rules: RetryRules = DEFAULT_RULES
    tolerances: Tolerances = DEFAULT_TOLERANCES
    in_use: Callable[[], frozenset[str]] = frozenset
    changed: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        # Downloads take long: they must not hold up the ledger.
        self._ledger_threads = ThreadPoolExecutor(NUM_LEDGER_THREADS, "adapter-ledger")
        self._file_threads = ThreadPoolExecutor(NUM_FILE_THREADS, "adapter-files")

    async def in_ledger(self, work: Callable[[], Result]) -> Result:
        """Run what blocks on the ledger."""
        return await asyncio.get_running_loop().run_in_executor(self._ledger_threads, work)

    async def fetch(self, manifest: Manifest, *, verify: bool) -> str:
        """Bring a version's files here.

        Raises:
            AdapterError: If they cannot be had.
        """
        in_use = self.in_use()
        return await asyncio.get_running_loop().run_in_executor(
            self._file_threads, lambda: self.files.fetch(manifest, in_use, verify=verify)
        )

    def close(self) -> None:
        """End the threads that wait for nothing."""
        self._ledger_threads.shutdown(wait=False, cancel_futures=True)
        self._file_threads.shutdown(wait=False, cancel_futures=True)
