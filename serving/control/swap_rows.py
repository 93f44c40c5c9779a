"""Between a replica's state machine and the ledger's placements; pure.

Owns the mapping of phases, and which rows have to be written. Called by `replica_sync.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.swap_slot import Phase, Slot
from serving.control.ledger import PlacementPhase, PlacementRow

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_PHASES = {
    Phase.LOADING: PlacementPhase.LOADING,
    Phase.LOADED: PlacementPhase.LOADED,
    Phase.READY: PlacementPhase.READY,
    Phase.DRAINING: PlacementPhase.DRAINING,
    Phase.UNLOADING: PlacementPhase.DRAINING,
    Phase.RETRYING: PlacementPhase.RETRYING,
    Phase.FAILED: PlacementPhase.FAILED,
}


def row_of(replica: str, version: str, slot: Slot) -> PlacementRow:
    """Return what is recorded of a slot."""
    is_retrying = slot.phase is Phase.RETRYING
    return PlacementRow(
        replica=replica,
        version=version,
        phase=_PHASES[slot.phase],
        path=slot.path,
        reason=slot.reason,
        num_attempts=slot.num_attempts,
        retry_at_s=slot.not_before_s if is_retrying else None,
        load_s=slot.load_s,
        ready_at_s=slot.ready_at_s,
    )


def slot_of(row: PlacementRow) -> Slot:
    """Return the slot to begin with after a restart of the control plane.

    What was ready stays so if the engine lists it still. All else that the engine may have is looked
    for in its list, and proven anew.
    """
    if row.phase is PlacementPhase.READY:
        return Slot(
            Phase.READY,
            row.path,
            is_registered=True,
            load_s=row.load_s,
            ready_at_s=row.ready_at_s,
        )
    if row.phase is PlacementPhase.FAILED:
        return Slot(Phase.FAILED, row.path, num_attempts=row.num_attempts, reason=row.reason)
    if row.phase in (PlacementPhase.LOADED, PlacementPhase.DRAINING):
        return Slot(Phase.LOADED, row.path, is_registered=True, load_s=row.load_s)
    return Slot(
        Phase.RETRYING if row.phase is PlacementPhase.RETRYING else Phase.LOADING,
        row.path,
        num_attempts=row.num_attempts,
        not_before_s=row.retry_at_s or 0.0,
        reason=row.reason,
    )


def changes(
    replica: str,
    slots: Mapping[str, Slot],
    recorded: Mapping[str, PlacementRow],
    known: Collection[str],
) -> tuple[list[PlacementRow], list[str]]:
    """Return the rows to write and the versions to forget.

    Args:
        replica: Name.
        slots: What is.
        recorded: What the ledger has.
        known: Versions that the ledger may hold; others were found in the engine and are only
            unloaded.
    """
    rows = {
        version: row_of(replica, version, slot)
        for version, slot in slots.items()
        if version in known or version in recorded
    }
    written = [row for version, row in rows.items() if recorded.get(version) != row]
    # What takes traffic away comes before what gives some.
    written.sort(key=lambda row: row.phase is PlacementPhase.READY)
    return written, [version for version in recorded if version not in rows]
