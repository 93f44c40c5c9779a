"""The queries over adapters that lists are made of.

Owns what the filters mean. Never changes anything. Used by `registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import and_, func, select, true

from serving.control.tables import Adapter, Label, Version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Select
    from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class AdapterFilter:
    """Which adapters are asked for; None is any.

    Attributes:
        text: Part of the name or of the owner, whatever the case.
        owner: The whole owner.
        labels: `KEY=VALUE`, or `KEY` for any value; all have to be there.
        base: Base model of a version that is not deleted.
        is_deleted_shown: Whether deleted ones are listed too.
    """

    text: str | None = None
    owner: str | None = None
    labels: Sequence[str] = ()
    base: str | None = None
    is_deleted_shown: bool = False


def filtered(wanted: AdapterFilter) -> Select[Adapter]:
    """Return the query of the adapters that are asked for, in no order."""
    query = select(Adapter)
    if not wanted.is_deleted_shown:
        query = query.where(Adapter.deleted_at_s.is_(None))
    if wanted.text is not None:
        text = wanted.text.lower()
        in_name = func.lower(Adapter.name).contains(text, autoescape=True)
        in_owner = func.lower(Adapter.owner).contains(text, autoescape=True)
        query = query.where(in_name | in_owner)
    if wanted.owner is not None:
        query = query.where(Adapter.owner == wanted.owner)
    for text in wanted.labels:
        key, separator, value = text.partition("=")
        has = and_(Label.adapter_id == Adapter.id, Label.key == key)
        if separator:
            has = and_(has, Label.value == value)
        query = query.where(select(Label.key).where(has).exists())
    if wanted.base is not None:
        of_base = and_(
            Version.adapter_id == Adapter.id,
            Version.base == wanted.base,
            true() if wanted.is_deleted_shown else Version.deleted_at_s.is_(None),
        )
        query = query.where(select(Version.lora_id).where(of_base).exists())
    return query


def num_versions(session: Session, adapters: Sequence[int]) -> dict[int, int]:
    """Return adapter's key → its versions that are not deleted; without those that have none."""
    rows = session.execute(
        select(Version.adapter_id, func.count().label("number"))
        .where(Version.adapter_id.in_(adapters), Version.deleted_at_s.is_(None))
        .group_by(Version.adapter_id)
    )
    return {row.adapter_id: row.number for row in rows}


def latest_versions(session: Session, adapters: Sequence[int]) -> dict[int, Version]:
    """Return adapter's key → its newest version that is not deleted."""
    newest = (
        select(func.max(Version.lora_id))
        .where(Version.adapter_id.in_(adapters), Version.deleted_at_s.is_(None))
        .group_by(Version.adapter_id)
    )
    rows = session.scalars(select(Version).where(Version.lora_id.in_(newest)))
    return {row.adapter_id: row for row in rows}
