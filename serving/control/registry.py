"""Adapters and their versions: reading, describing, deleting.

Owns the rules of deletion: what an alias points at or would roll back to stays; deleting keeps the
row, and the same content pushed again brings it back. Never takes files (`registration.py` does).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sqlalchemy import select

from serving.control import audit
from serving.control.adapter_answers import adapter_answer, version_answer, version_summary
from serving.control.adapter_queries import filtered, latest_versions, num_versions
from serving.control.aliases import names_referring_to
from serving.control.database import publish
from serving.control.errors import InUse, InvalidRequest, NotFound
from serving.control.paging import decode_cursor, page_of
from serving.control.tables import Adapter, Label, Version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from serving.control.adapter_queries import AdapterFilter
    from serving.control.audit import Caller
    from serving.control.database import Database
    from serving.control.revisions import Expected
    from serving.control.shapes.adapters import (
        AdapterAnswer,
        PatchAdapter,
        VersionAnswer,
        VersionSummary,
    )
    from serving.control.shapes.common import Page

MIN_DIGEST_CHARS = 12
MAX_DIGEST_CHARS = 64


class Registry:
    """The adapters of one database; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        """Know where the state is."""
        self._database = database

    def page(self, wanted: AdapterFilter, limit: int, cursor: str | None) -> Page[AdapterAnswer]:
        """Return adapters by name.

        Raises:
            InvalidRequest: If the cursor is not one of ours.
        """
        query = filtered(wanted).order_by(Adapter.name).limit(limit + 1)
        if cursor is not None:
            query = query.where(Adapter.name > decode_cursor(cursor, str))
        with self._database.read() as session:
            rows = list(session.scalars(query))
            counts = num_versions(session, [row.id for row in rows])
            latest = latest_versions(session, [row.id for row in rows])

            def answer(row: Adapter) -> AdapterAnswer:
                return adapter_answer(row, counts.get(row.id, 0), latest.get(row.id))

            return page_of(rows, limit, answer, lambda row: row.name)

    def get(self, name: str) -> AdapterAnswer:
        """Return an adapter that is not deleted.

        Raises:
            NotFound: If there is none of this name.
        """
        with self._database.read() as session:
            return _answer(session, _live_adapter(session, name))

    def versions(
        self, name: str, is_deleted_shown: bool, limit: int, cursor: str | None
    ) -> Page[VersionSummary]:
        """Return an adapter's versions, the newest first.

        Raises:
            NotFound: If there is no such adapter.
            InvalidRequest: If the cursor is not one of ours.
        """
        with self._database.read() as session:
            adapter = _live_adapter(session, name)
            query = select(Version).where(Version.adapter_id == adapter.id)
            query = query.order_by(Version.lora_id.desc()).limit(limit + 1)
            if not is_deleted_shown:
                query = query.where(Version.deleted_at_s.is_(None))
            if cursor is not None:
                query = query.where(Version.lora_id < decode_cursor(cursor, int))
            rows = list(session.scalars(query))
            return page_of(rows, limit, version_summary, lambda row: row.lora_id)

    def version(self, name: str, digest: str) -> VersionAnswer:
        """Return a version, by its whole digest or the first 12 digits or more of it.

        Raises:
            NotFound: If there is none.
        """
        with self._database.read() as session:
            row = find_version(session, name, digest)
            return version_answer(row, name, names_referring_to(session, row.name))

    def describe(
        self, name: str, changes: PatchAdapter, expected: Expected, caller: Caller
    ) -> AdapterAnswer:
        """Change owner, description or labels.

        Raises:
            NotFound: If there is no such adapter.
            StaleRevision: If the revision is another.
            PreconditionFailed: If a header does not hold.
        """
        with self._database.write() as session:
            adapter = _live_adapter(session, name)
            expected.check(f"Adapter '{name}'", adapter.revision)
            before = shown(adapter)
            if changes.owner is not None:
                adapter.owner = changes.owner
            if changes.description is not None:
                adapter.description = changes.description
            if changes.labels is not None:
                set_labels(adapter, changes.labels)
            touch(adapter)
            session.flush()
            after = shown(adapter)
            audit.record(session, caller, "patch", "adapter", name, before=before, after=after)
            return _answer(session, adapter)

    def delete_version(self, name: str, digest: str, caller: Caller) -> str:
        """Delete a version, and return its name.

        Raises:
            NotFound: If there is none.
            InUse: If an alias points at it, waits for it, or would roll back to it.
        """
        with self._database.write() as session:
            row = find_version(session, name, digest)
            _check_unused(session, [row])
            row.deleted_at_s = time.time()
            audit.record(session, caller, "delete", "version", row.name)
            publish(session)
            return row.name

    def delete(self, name: str, expected: Expected, caller: Caller) -> None:
        """Delete an adapter with all its versions.

        Raises:
            NotFound: If there is no such adapter.
            InUse: If an alias needs a version of it.
            PreconditionFailed: If a header does not hold.
        """
        with self._database.write() as session:
            adapter = _live_adapter(session, name)
            expected.check(f"Adapter '{name}'", adapter.revision)
            query = select(Version).where(Version.adapter_id == adapter.id)
            rows = list(session.scalars(query.where(Version.deleted_at_s.is_(None))))
            _check_unused(session, rows)
            now_s = time.time()
            for row in rows:
                row.deleted_at_s = now_s
                audit.record(session, caller, "delete", "version", row.name)
            adapter.deleted_at_s = now_s
            touch(adapter)
            audit.record(session, caller, "delete", "adapter", name, before=shown(adapter))
            publish(session)


def find_version(session: Session, name: str, digest: str) -> Version:
    """Return a version that is not deleted.

    Raises:
        NotFound: If there is none.
        InvalidRequest: If the digest is too short.
    """
    if not MIN_DIGEST_CHARS <= len(digest) <= MAX_DIGEST_CHARS:
        raise InvalidRequest(
            f"Give at least the first {MIN_DIGEST_CHARS} digits of the digest.", param="digest"
        )
    query = select(Version).join(Adapter, Adapter.id == Version.adapter_id)
    query = query.where(
        Adapter.name == name, Version.deleted_at_s.is_(None), Adapter.deleted_at_s.is_(None)
    )
    wanted = f"{name}@{digest[:MIN_DIGEST_CHARS]}"
    row = session.scalars(query.where(Version.name == wanted)).one_or_none()
    if row is None or not row.digest.startswith(digest):
        raise NotFound(f"There is no version '{name}@{digest}'.", code="version_not_found")
    return row


def set_labels(adapter: Adapter, labels: dict[str, str]) -> None:
    """Give an adapter these labels and no others."""
    present = {label.key: label for label in adapter.labels}
    for key, value in labels.items():
        if key in present:
            present[key].value = value
        else:
            adapter.labels.append(Label(key=key, value=value))
    for key in present.keys() - labels.keys():
        adapter.labels.remove(present[key])


def touch(adapter: Adapter) -> None:
    """Count a change of an adapter."""
    adapter.revision += 1
    adapter.updated_at_s = time.time()


def shown(adapter: Adapter) -> dict[str, object]:
    """Return what the audit keeps of an adapter."""
    return {
        "owner": adapter.owner,
        "description": adapter.description,
        "labels": {label.key: label.value for label in adapter.labels},
        "revision": adapter.revision,
    }


def _answer(session: Session, adapter: Adapter) -> AdapterAnswer:
    counts = num_versions(session, [adapter.id])
    latest = latest_versions(session, [adapter.id])
    return adapter_answer(adapter, counts.get(adapter.id, 0), latest.get(adapter.id))


def _live_adapter(session: Session, name: str) -> Adapter:
    query = select(Adapter).where(Adapter.name == name, Adapter.deleted_at_s.is_(None))
    adapter = session.scalars(query).one_or_none()
    if adapter is None:
        raise NotFound(f"There is no adapter '{name}'.", code="adapter_not_found")
    return adapter


def _check_unused(session: Session, rows: Sequence[Version]) -> None:
    for row in rows:
        names = names_referring_to(session, row.name)
        if names:
            raise InUse(
                f"{row.name} is the target, the pending target or the rollback target of "
                f"{', '.join(names)}: point these elsewhere first."
            )
