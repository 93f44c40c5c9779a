"""Who changed what: appended in the transaction of the change itself.

Owns the events' wording. Never changes or deletes one; the database refuses that too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from serving.control.paging import decode_cursor, page_of
from serving.control.shapes.audit import AuditAnswer
from serving.control.tables import AuditEvent

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from serving.control.shapes.common import Page


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf something is done.

    Attributes:
        principal: Who, as the gateway authenticated them.
        request_id: Of the request; empty where the control plane acts by itself.
    """

    principal: str
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which events are asked for; None is any."""

    kind: str | None = None
    subject: str | None = None
    principal: str | None = None
    action: str | None = None


def record(
    session: Session,
    caller: Caller,
    action: str,
    kind: str,
    subject: str,
    *,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    """Append an event.

    Args:
        session: Of the transaction that makes the change.
        caller: Who makes it.
        action: What is done, for example `flip`.
        kind: Of what: `adapter`, `version`, `alias` or `placement`.
        subject: Its name.
        before: It, or what changes of it, before.
        after: The same, after.
    """
    session.add(
        AuditEvent(
            at_s=time.time(),
            principal=caller.principal,
            request_id=caller.request_id,
            action=action,
            kind=kind,
            subject=subject,
            before=before,
            after=after,
        )
    )


def events(
    session: Session, wanted: AuditFilter, limit: int, cursor: str | None
) -> Page[AuditAnswer]:
    """Return events, the newest first.

    Raises:
        InvalidRequest: If the cursor is not one of ours.
    """
    query = select(AuditEvent).order_by(AuditEvent.id.desc()).limit(limit + 1)
    for name in ("kind", "subject", "principal", "action"):
        value = getattr(wanted, name)
        if value is not None:
            query = query.where(getattr(AuditEvent, name) == value)
    if cursor is not None:
        query = query.where(AuditEvent.id < decode_cursor(cursor, int))
    rows = list(session.scalars(query))
    return page_of(rows, limit, _answer, lambda row: row.id)


def _answer(row: AuditEvent) -> AuditAnswer:
    return AuditAnswer(
        id=row.id,
        at=row.at_s,
        principal=row.principal,
        request_id=row.request_id,
        action=row.action,
        kind=row.kind,
        subject=row.subject,
        before=row.before,
        after=row.after,
    )
