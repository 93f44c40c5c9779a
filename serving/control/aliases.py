"""Aliases: where they point, and the ways to point them elsewhere.

Owns the rules of a flip. A target that is a base model, or a version proven on enough replicas, is
taken at once; another version becomes the alias's pending target, and the alias keeps the present
one until `alias_moves.flip` (the reconciler has it called). A new alias is published at once: its first requests wait
for the version to be loaded. A rollback is the same flip, to the distinct target before.

Called by `routes/aliases.py` and `registration.py`. Each method is one transaction or takes the session
of one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sqlalchemy import select

from adapters.version import alias_name, parse_version
from serving.control import audit
from serving.control.alias_moves import aim, clear_pending, record_change, shown, touch
from serving.control.alias_states import answer, is_version
from serving.control.database import publish
from serving.control.errors import Conflict, NotFound, Unprocessable
from serving.control.paging import decode_cursor, page_of
from serving.control.shapes.aliases import AliasAnswer, AliasChangeAnswer
from serving.control.tables import Adapter, Alias, AliasChange, Version

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

    from serving.control.audit import Caller
    from serving.control.database import Database
    from serving.control.engine_view import EngineView
    from serving.control.revisions import Expected
    from serving.control.shapes.aliases import PutAlias
    from serving.control.shapes.common import Page


class Aliases:
    """The aliases of one database."""

    def __init__(self, database: Database, engines: EngineView, num_replicas: int) -> None:
        """Know where the state is.

        Args:
            database: Where it is.
            engines: Which base models there are.
            num_replicas: Of the fleet; 0 if it is not known.
        """
        self._database = database
        self._engines = engines
        self._num_replicas = num_replicas

    def get(self, name: str) -> AliasAnswer:
        """Return an alias.

        Raises:
            NotFound: If there is none of this name.
        """
        with self._database.read() as session:
            return answer(session, _existing(session, name))

    def page(self, target: str | None, limit: int, cursor: str | None) -> Page[AliasAnswer]:
        """Return aliases by name, all or those with this target, previous or pending target.

        Raises:
            InvalidRequest: If the cursor is not one of ours.
        """
        query = select(Alias).order_by(Alias.name).limit(limit + 1)
        if target is not None:
            query = query.where(_refers_to(target))
        if cursor is not None:
            query = query.where(Alias.name > decode_cursor(cursor, str))
        with self._database.read() as session:
            rows = list(session.scalars(query))
            return page_of(rows, limit, lambda row: answer(session, row), lambda row: row.name)

    def history(self, name: str, limit: int, cursor: str | None) -> Page[AliasChangeAnswer]:
        """Return what happened to an alias, the newest first; also of one that was deleted.

        Raises:
            NotFound: If there never was one of this name.
            InvalidRequest: If the cursor is not one of ours.
        """
        query = select(AliasChange).where(AliasChange.alias == name)
        query = query.order_by(AliasChange.id.desc()).limit(limit + 1)
        if cursor is not None:
            query = query.where(AliasChange.id < decode_cursor(cursor, int))
        with self._database.read() as session:
            rows = list(session.scalars(query))
            if not rows and cursor is None:
                raise _unknown(name)
            return page_of(rows, limit, _change_answer, lambda row: row.id)

    def put(
        self, name: str, wanted: PutAlias, expected: Expected, caller: Caller
    ) -> tuple[AliasAnswer, bool]:
        """Point an alias at a target, or have it wait for it.

        Returns:
            The alias, and whether it is new.

        Raises:
            NotFound: If the target is a version that does not exist.
            Unprocessable: If it is a base model that no replica serves, or wants too many copies.
            Conflict: If the name is a base model's.
            StaleRevision: If the revision is another.
            PreconditionFailed: If a header does not hold.
        """
        with self._database.write() as session:
            return self.put_within(session, name, wanted, expected, caller)

    def put_within(
        self, session: Session, name: str, wanted: PutAlias, expected: Expected, caller: Caller
    ) -> tuple[AliasAnswer, bool]:
        """`put`, in a transaction of the caller's."""
        alias = session.get(Alias, alias_name(name))
        expected.check(f"Alias '{name}'", alias.revision if alias else 0)
        target = self._checked_target(session, wanted.target)
        self._check_copies(wanted.min_copies)
        if alias is None:
            return answer(session, self._create(session, name, target, wanted, caller)), True
        before = shown(alias)
        if wanted.min_copies is not None:
            alias.min_copies = wanted.min_copies
        alias.owner = wanted.owner or alias.owner
        alias.description = alias.description if wanted.description is None else wanted.description
        touch(alias)
        aim(session, alias, target, "flip", caller)
        audit.record(session, caller, "put", "alias", name, before=before, after=shown(alias))
        publish(session)
        return answer(session, alias), False

    def rollback(self, name: str, expected: Expected, caller: Caller) -> AliasAnswer:
        """Undo the last change: give a waiting flip up, else go to the distinct target before.

        The target left becomes the one before, so that a second rollback undoes the first.

        Raises:
            NotFound: If there is no such alias.
            Conflict: If it has had one target only.
            StaleRevision: If the revision is another.
            PreconditionFailed: If a header does not hold.
        """
        with self._database.write() as session:
            alias = _existing(session, name)
            expected.check(f"Alias '{name}'", alias.revision)
            before = shown(alias)
            is_waiting = alias.pending is not None and alias.pending_reason is None
            if not is_waiting and alias.previous is None:
                raise Conflict(
                    f"Alias '{name}' has had no other target: there is nothing to go back to.",
                    code="no_previous_target",
                )
            touch(alias)
            if is_waiting:
                record_change(session, alias, "cancel", alias.pending, alias.target, caller)
                clear_pending(alias)
            elif alias.previous is not None:
                target = self._checked_target(session, alias.previous)
                aim(session, alias, target, "rollback", caller)
            after = shown(alias)
            audit.record(session, caller, "rollback", "alias", name, before=before, after=after)
            publish(session)
            return answer(session, alias)

    def delete(self, name: str, expected: Expected, caller: Caller) -> None:
        """Delete an alias; its history stays.

        Raises:
            NotFound: If there is none of this name.
            PreconditionFailed: If a header does not hold.
        """
        with self._database.write() as session:
            alias = _existing(session, name)
            expected.check(f"Alias '{name}'", alias.revision)
            touch(alias)
            record_change(session, alias, "delete", alias.target, None, caller)
            audit.record(session, caller, "delete", "alias", name, before=shown(alias))
            session.delete(alias)
            publish(session)

    def _create(
        self, session: Session, name: str, target: str, wanted: PutAlias, caller: Caller
    ) -> Alias:
        if name in self._engines.base_names():
            raise Conflict(
                f"'{name}' is the name of a base model: choose another alias.", code="name_taken"
            )
        now_s = time.time()
        alias = Alias(
            name=name,
            target=target,
            min_copies=wanted.min_copies or 0,
            owner=wanted.owner or caller.principal,
            description=wanted.description or "",
            revision=_last_revision(session, name) + 1,
            created_at_s=now_s,
            updated_at_s=now_s,
        )
        session.add(alias)
        record_change(session, alias, "create", None, target, caller)
        audit.record(session, caller, "create", "alias", name, after=shown(alias))
        publish(session)
        return alias

    def _checked_target(self, session: Session, text: str) -> str:
        if not is_version(text):
            if self._engines.is_base(text):
                return text
            raise Unprocessable(
                f"No replica serves a base model '{text}': name one, or a version NAME@DIGEST.",
                param="target",
                code="unknown_base_model",
            )
        version = _live_version(session, text)
        if not self._engines.is_base(version.base):
            raise Unprocessable(
                f"{version.name} was made for '{version.base}', which no replica serves.",
                param="target",
                code="wrong_base_model",
            )
        return version.name

    def _check_copies(self, min_copies: int | None) -> None:
        if min_copies and self._num_replicas and min_copies > self._num_replicas:
            raise Unprocessable(
                f"min_copies {min_copies}: the fleet has {self._num_replicas} replicas.",
                param="min_copies",
            )


def names_referring_to(session: Session, version: str) -> list[str]:
    """Return the aliases that point at a version, wait for it, or would roll back to it."""
    return list(session.scalars(select(Alias.name).where(_refers_to(version)).order_by(Alias.name)))


def _refers_to(target: str) -> ColumnElement[bool]:
    return (Alias.target == target) | (Alias.previous == target) | (Alias.pending == target)


def _last_revision(session: Session, name: str) -> int:
    """Of an alias that was deleted: a name's revisions never repeat."""
    query = select(AliasChange.revision).where(AliasChange.alias == name)
    return session.scalars(query.order_by(AliasChange.id.desc()).limit(1)).first() or 0


def _live_version(session: Session, text: str) -> Version:
    name = str(parse_version(text))
    query = select(Version).join(Adapter, Adapter.id == Version.adapter_id)
    query = query.where(
        Version.name == name, Version.deleted_at_s.is_(None), Adapter.deleted_at_s.is_(None)
    )
    version = session.scalars(query).one_or_none()
    digest = text.partition("@")[2]
    if version is None or not version.digest.startswith(digest):
        raise NotFound(
            f"There is no version '{text[:200]}'.", param="target", code="version_not_found"
        )
    return version


def _existing(session: Session, name: str) -> Alias:
    alias = session.get(Alias, name)
    if alias is None:
        raise _unknown(name)
    return alias


def _unknown(name: str) -> NotFound:
    return NotFound(f"There is no alias '{name}'.", code="alias_not_found")


def _change_answer(row: AliasChange) -> AliasChangeAnswer:
    return AliasChangeAnswer(
        id=row.id,
        action=row.action,
        before=row.before,
        after=row.after,
        revision=row.revision,
        principal=row.principal,
        at=row.at_s,
    )
