"""Where an alias and its pending version stand, read from the tables.

Owns what "proven on enough replicas" means. Never changes anything: `aliases.py` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from serving.control.ledger import PlacementPhase
from serving.control.shapes.aliases import AliasAnswer, AliasState, PendingTarget
from serving.control.tables import Placed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from serving.control.tables import Alias


def is_version(target: str) -> bool:
    """Whether a target is a version; the names of base models have no "@"."""
    return "@" in target


def num_ready(session: Session, version: str) -> int:
    """Count the replicas where a version is proven."""
    query = select(func.count()).select_from(Placed)
    query = query.where(Placed.version == version, Placed.phase == PlacementPhase.READY)
    return session.execute(query).scalar_one()


def num_needed(session: Session, alias: Alias) -> int:
    """Return on how many replicas the next version of an alias has to be proven before the flip.

    As many as have the present one, so that a flip never has fewer replicas serve the alias than
    before; at least `min_copies`, and one.
    """
    serving = num_ready(session, alias.target) if is_version(alias.target) else 0
    return max(1, alias.min_copies, serving)


def state_of(alias: Alias) -> AliasState:
    """Return whether an alias is where it shall be."""
    if alias.pending is None:
        return AliasState.SERVING
    return AliasState.PENDING if alias.pending_reason is None else AliasState.FAILED


def answer(session: Session, alias: Alias) -> AliasAnswer:
    """Return an alias as the API shows it."""
    return AliasAnswer(
        alias=alias.name,
        target=alias.target,
        previous=alias.previous,
        state=state_of(alias),
        pending=_pending(session, alias),
        min_copies=alias.min_copies,
        owner=alias.owner,
        description=alias.description,
        revision=alias.revision,
        created_at=alias.created_at_s,
        updated_at=alias.updated_at_s,
    )


def _pending(session: Session, alias: Alias) -> PendingTarget | None:
    if alias.pending is None:
        return None
    placed = session.scalars(
        select(Placed).where(Placed.version == alias.pending).order_by(Placed.replica)
    ).all()
    return PendingTarget(
        target=alias.pending,
        reason=alias.pending_reason,
        since=alias.pending_since_s or alias.updated_at_s,
        num_ready=num_ready(session, alias.pending),
        num_needed=num_needed(session, alias),
        replicas=_told(placed),
    )


def _told(placed: Sequence[Placed]) -> dict[str, str]:
    return {
        row.replica: f"{row.phase}: {row.reason}" if row.reason else row.phase for row in placed
    }
