"""Which replica has what: reading the placements, and giving a failed one another chance.

Never loads anything: the reconciler does, by what is recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from adapters.version import parse_version
from serving.control import audit
from serving.control.errors import Conflict, NotFound
from serving.control.ledger import PlacementPhase
from serving.control.shapes.replicas import PlacementAnswer, ReplicaAnswer
from serving.control.tables import Placed, Version

if TYPE_CHECKING:
    from serving.control.audit import Caller
    from serving.control.database import Database
    from serving.control.engine_view import EngineView


def replicas(database: Database, engines: EngineView) -> list[ReplicaAnswer]:
    """Return every replica of the fleet, and every other that something is recorded of."""
    with database.read() as session:
        rows = session.scalars(select(Placed).order_by(Placed.replica, Placed.version)).all()
        placed: dict[str, list[PlacementAnswer]] = {}
        for row in rows:
            placed.setdefault(row.replica, []).append(_answer(row))
    known = [
        ReplicaAnswer(
            replica=view.name,
            engine=view.engine,
            reachable=view.is_reachable,
            reason=view.reason,
            versions=placed.pop(view.name, []),
        )
        for view in engines.replicas()
    ]
    gone = [
        ReplicaAnswer(
            replica=name,
            engine="unknown",
            reachable=False,
            reason="It is not in this control plane's settings.",
            versions=versions,
        )
        for name, versions in placed.items()
    ]
    return known + gone


def placements_of(database: Database, version: str) -> list[PlacementAnswer]:
    """Return where a version is.

    Raises:
        NotFound: If there is no such version, deleted or not.
        InvalidName: If it is no version's name.
    """
    name = str(parse_version(version))
    with database.read() as session:
        if session.scalar(select(Version.lora_id).where(Version.name == name)) is None:
            raise NotFound(f"There is no version '{name}'.", code="version_not_found")
        rows = session.scalars(
            select(Placed).where(Placed.version == name).order_by(Placed.replica)
        )
        return [_answer(row) for row in rows]


def retry(database: Database, replica: str, version: str, caller: Caller) -> PlacementAnswer:
    """Have a failed placement tried again now.

    Raises:
        NotFound: If nothing is recorded of the version on the replica.
        Conflict: If it has not failed.
        InvalidName: If it is no version's name.
    """
    name = str(parse_version(version))
    with database.write() as session:
        row = session.get(Placed, (replica, name))
        if row is None:
            raise NotFound(
                f"Nothing is recorded of {name} on {replica}.", code="placement_not_found"
            )
        if row.phase not in (PlacementPhase.FAILED, PlacementPhase.RETRYING):
            raise Conflict(f"{name} is {row.phase} on {replica}: there is nothing to retry.")
        before = {"phase": row.phase, "reason": row.reason, "num_attempts": row.num_attempts}
        row.phase, row.num_attempts, row.retry_at_s = PlacementPhase.RETRYING, 0, 0.0
        subject = f"{name} on {replica}"
        audit.record(session, caller, "retry", "placement", subject, before=before)
        return _answer(row)


def _answer(row: Placed) -> PlacementAnswer:
    return PlacementAnswer(
        version=row.version,
        replica=row.replica,
        phase=PlacementPhase(row.phase),
        reason=row.reason,
        num_attempts=row.num_attempts,
        retry_at=row.retry_at_s,
        load_s=row.load_s,
        ready_at=row.ready_at_s,
    )
