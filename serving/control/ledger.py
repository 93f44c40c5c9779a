"""What the reconciler reads and writes of the control plane's state: the seam between both.

Owns the interface and its records. Implemented over the database by `placements.py`; used by
`reconcile.py`, whose tests may keep a ledger in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters.manifest import Manifest


class PlacementPhase(StrEnum):
    """Where one version stands on one replica."""

    LOADING = "loading"
    LOADED = "loaded"  # the engine has it; it is being probed
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"  # terminal until a retry is asked for or the replica restarts
    RETRYING = "retrying"  # the last attempt failed; the next one has its time


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """One version on one replica, as recorded.

    Attributes:
        replica: `host:port`.
        version: `name@digest12`.
        path: Its folder as the engine sees it.
        reason: Of a failure, one sentence.
        num_attempts: Failed in a row.
        retry_at_s: Unix time of the next attempt, for `RETRYING`.
        load_s: How long the last load took, probe excluded.
        ready_at_s: Unix time of the proof.
    """

    replica: str
    version: str
    phase: PlacementPhase
    path: str
    reason: str | None = None
    num_attempts: int = 0
    retry_at_s: float | None = None
    load_s: float | None = None
    ready_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class WantedVersion:
    """A version that may have to be on replicas.

    Attributes:
        version: `name@digest12`.
        manifest: Of it.
        lora_id: Unique number of the version.
        min_copies: Replicas that must have it now (a flip that waits for it, a pinned alias).
        is_aliased: Whether an alias points at it: it may be loaded when asked for.
        unloadable: Engine kind → why the linter says that it cannot load there.
        may_do_nothing: Whether it was taken although it may answer as its base model does.
    """

    version: str
    manifest: Manifest
    lora_id: int
    min_copies: int
    is_aliased: bool
    unloadable: dict[str, str]
    may_do_nothing: bool = False


@dataclass(frozen=True, slots=True)
class PendingFlip:
    """An alias that waits for its new version to be proven.

    Attributes:
        alias: The alias.
        target: Version that it shall point at.
        num_ready: Replicas where `target` has to be ready before it flips.
    """

    alias: str
    target: str
    num_ready: int


class Ledger(Protocol):
    """The state, as the reconciler sees it. Every method is one short transaction; all may block."""

    def wanted(self) -> Sequence[WantedVersion]:
        """Versions that are neither deleted nor without a name or alias that could ask for them."""

    def placements(self) -> Sequence[PlacementRow]:
        """Every placement that is recorded."""

    def record(self, row: PlacementRow) -> None:
        """Insert or replace a placement; a change that gateways have to know is published."""

    def forget(self, replica: str, version: str) -> None:
        """Delete a placement: the engine has it no more."""

    def pending_flips(self) -> Sequence[PendingFlip]:
        """Flips that wait."""

    def flip(self, alias: str) -> None:
        """Point an alias at its pending target, in one published snapshot."""

    def fail_flip(self, alias: str, reason: str) -> None:
        """Give a pending flip up; the alias keeps its target and shows the reason."""

    def golden(self, version: str, engine_kind: str) -> Sequence[float] | None:
        """The logprobs that a version was first proven with on an engine kind, or None."""

    def record_golden(self, version: str, engine_kind: str, logprobs: Sequence[float]) -> None:
        """Keep the logprobs of a version's first proof on an engine kind."""
