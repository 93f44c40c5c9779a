"""Reads what gateways have to know out of the database, at one moment.

Owns the query behind a published snapshot. Never keeps or sends it: `publisher.py` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sqlalchemy import select

from serving.control.database import state
from serving.control.ledger import PlacementPhase
from serving.control.tables import Adapter, Alias, Placed, Version
from serving.routing.published import (
    Placement,
    PlacementState,
    Published,
    PublishedAlias,
    PublishedVersion,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

PUBLISHED_PHASES = frozenset((PlacementPhase.LOADED, PlacementPhase.READY, PlacementPhase.DRAINING))


def read_published(session: Session, known: tuple[str, int] | None) -> Published | None:
    """Return the state that gateways follow, or None if it is the known one.

    Args:
        session: A reader's.
        known: Epoch and snapshot version that the caller has.
    """
    row = state(session)
    if (row.epoch, row.snapshot_version) == known:
        return None
    placements = _placements(session)
    return Published(
        epoch=row.epoch,
        version=row.snapshot_version,
        aliases=_aliases(session),
        versions=_versions(session, placements),
    )


def _placements(session: Session) -> dict[str, dict[str, Placement]]:
    """Version → replica → where it stands there."""
    rows = session.execute(
        select(Placed.version, Placed.replica, Placed.phase, Placed.path).where(
            Placed.phase.in_(PUBLISHED_PHASES)
        )
    )
    found: dict[str, dict[str, Placement]] = {}
    for version, replica, phase, path in rows:
        placement = Placement(state=cast("PlacementState", phase), path=path)
        found.setdefault(version, {})[replica] = placement
    return found


def _aliases(session: Session) -> dict[str, PublishedAlias]:
    rows = session.execute(select(Alias.name, Alias.target, Alias.created_at_s, Alias.owner))
    return {
        name: PublishedAlias(target=target, created_at_s=int(created_at_s), owner=owner)
        for name, target, created_at_s, owner in rows.all()
    }


def _versions(
    session: Session, placements: dict[str, dict[str, Placement]]
) -> dict[str, PublishedVersion]:
    rows = session.execute(
        select(Version.name, Version.base, Version.lora_id, Version.rank, Version.size_bytes)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(Version.deleted_at_s.is_(None), Adapter.deleted_at_s.is_(None))
    )
    return {
        name: PublishedVersion(
            base=base,
            lora_id=lora_id,
            rank=rank,
            size_bytes=size_bytes,
            placements=placements.get(name, {}),
        )
        for name, base, lora_id, rank, size_bytes in rows.all()
    }
