"""The ledger over the database: what the reconciler reads and writes.

Owns when a placement's change is published. Never talks to a replica. The interface is
`ledger.Ledger`; every method is one transaction and may block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from adapters.manifest import Manifest
from serving.control import alias_moves
from serving.control.alias_states import is_version, num_needed
from serving.control.database import publish
from serving.control.judgement import may_do_nothing, unloadable
from serving.control.ledger import PendingFlip, PlacementPhase, PlacementRow, WantedVersion
from serving.control.snapshot_reader import PUBLISHED_PHASES
from serving.control.tables import Adapter, Alias, Golden, Placed, Version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from serving.control.database import Database


class DatabaseLedger:
    """`ledger.Ledger` over the control plane's database."""

    def __init__(self, database: Database) -> None:
        """Know where the state is."""
        self._database = database
        self._manifests: dict[str, Manifest] = {}
        # What is flipped or given up is what was read: meanwhile somebody may want another target.
        self._read_flips: dict[str, str] = {}

    def wanted(self) -> Sequence[WantedVersion]:
        """Versions that are neither deleted nor without a name or alias that could ask for them."""
        with self._database.read() as session:
            flips = _flips(session)
            aliased = session.execute(select(Alias.target, Alias.min_copies)).all()
            rows = session.execute(
                select(Version.name, Version.lora_id, Version.manifest, Version.report)
                .join(Adapter, Adapter.id == Version.adapter_id)
                .where(Version.deleted_at_s.is_(None), Adapter.deleted_at_s.is_(None))
            ).all()
        copies: dict[str, int] = {}
        for target, min_copies in aliased:
            copies[target] = max(copies.get(target, 0), min_copies)
        waiting = {flip.target: flip.num_ready for flip in flips}
        self._forget_manifests({row.name for row in rows})
        return [
            WantedVersion(
                version=row.name,
                manifest=self._manifest(row.name, row.manifest),
                lora_id=row.lora_id,
                min_copies=max(copies.get(row.name, 0), waiting.get(row.name, 0)),
                is_aliased=row.name in copies,
                unloadable=unloadable(row.report),
                may_do_nothing=may_do_nothing(row.report),
            )
            for row in rows
        ]

    def placements(self) -> Sequence[PlacementRow]:
        """Every placement that is recorded."""
        with self._database.read() as session:
            return [_row(placed) for placed in session.scalars(select(Placed))]

    def record(self, row: PlacementRow) -> None:
        """Insert or replace a placement; a change that gateways have to know is published."""
        with self._database.write() as session:
            placed = session.get(Placed, (row.replica, row.version))
            before = _seen(placed)
            if placed is None:
                placed = Placed(replica=row.replica, version=row.version)
                session.add(placed)
            placed.phase = row.phase
            placed.path = row.path
            placed.reason = row.reason
            placed.num_attempts = row.num_attempts
            placed.retry_at_s = row.retry_at_s
            placed.load_s = row.load_s
            placed.ready_at_s = row.ready_at_s
            if _seen(placed) != before:
                publish(session)

    def forget(self, replica: str, version: str) -> None:
        """Delete a placement: the engine has it no more."""
        with self._database.write() as session:
            placed = session.get(Placed, (replica, version))
            if placed is None:
                return
            if _seen(placed) is not None:
                publish(session)
            session.delete(placed)

    def pending_flips(self) -> Sequence[PendingFlip]:
        """Flips that wait."""
        with self._database.read() as session:
            flips = _flips(session)
        self._read_flips = {flip.alias: flip.target for flip in flips}
        return flips

    def flip(self, alias: str) -> None:
        """Point an alias at its pending target, in one published snapshot."""
        with self._database.write() as session:
            alias_moves.flip(session, alias, self._read_flips.get(alias))

    def fail_flip(self, alias: str, reason: str) -> None:
        """Give a pending flip up; the alias keeps its target and shows the reason."""
        with self._database.write() as session:
            alias_moves.fail(session, alias, self._read_flips.get(alias), reason)

    def golden(self, version: str, engine_kind: str) -> Sequence[float] | None:
        """The logprobs that a version was first proven with on an engine kind, or None."""
        with self._database.read() as session:
            found = session.get(Golden, (version, engine_kind))
            return None if found is None else list(found.logprobs)

    def record_golden(self, version: str, engine_kind: str, logprobs: Sequence[float]) -> None:
        """Keep the logprobs of a version's first proof on an engine kind."""
        with self._database.write() as session:
            if session.get(Golden, (version, engine_kind)) is None:
                kept = Golden(version=version, engine_kind=engine_kind, logprobs=list(logprobs))
                session.add(kept)

    def _manifest(self, version: str, text: str) -> Manifest:
        """Parsed once: a version's manifest never changes."""
        manifest = self._manifests.get(version)
        if manifest is None:
            manifest = self._manifests[version] = Manifest.model_validate_json(text)
        return manifest

    def _forget_manifests(self, known: set[str]) -> None:
        for version in self._manifests.keys() - known:
            del self._manifests[version]


def _flips(session: Session) -> list[PendingFlip]:
    waiting = session.scalars(
        select(Alias).where(Alias.pending.is_not(None), Alias.pending_reason.is_(None))
    )
    return [
        PendingFlip(alias.name, alias.pending, num_needed(session, alias))
        for alias in waiting.all()
        if alias.pending is not None and is_version(alias.pending)
    ]


def _seen(placed: Placed | None) -> tuple[str, str] | None:
    """What gateways see of a placement."""
    if placed is None or placed.phase not in PUBLISHED_PHASES:
        return None
    return placed.phase, placed.path


def _row(placed: Placed) -> PlacementRow:
    return PlacementRow(
        replica=placed.replica,
        version=placed.version,
        phase=PlacementPhase(placed.phase),
        path=placed.path,
        reason=placed.reason,
        num_attempts=placed.num_attempts,
        retry_at_s=placed.retry_at_s,
        load_s=placed.load_s,
        ready_at_s=placed.ready_at_s,
    )
