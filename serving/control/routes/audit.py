"""`/admin/v1/audit`: who changed what."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from serving.control.audit import AuditFilter, events
from serving.control.context import TheControl
from serving.control.shapes.audit import AuditAnswer
from serving.control.shapes.common import DEFAULT_PAGE, Cursor, Limit, Page, errors

router = APIRouter(prefix="/admin/v1", tags=["audit"])


@router.get("/audit", summary="List changes", responses=errors())
def list_events(
    control: TheControl,
    kind: Annotated[
        str | None,
        Query(max_length=16, description="`adapter`, `version`, `alias`, `placement` or `epoch`."),
    ] = None,
    subject: Annotated[
        str | None, Query(max_length=256, description="Name of what was changed.")
    ] = None,
    principal: Annotated[str | None, Query(max_length=200, description="Who changed it.")] = None,
    action: Annotated[str | None, Query(max_length=32, description="What was done.")] = None,
    limit: Limit = DEFAULT_PAGE,
    cursor: Cursor = None,
) -> Page[AuditAnswer]:
    """List changes, the newest first; all filters have to hold."""
    wanted = AuditFilter(kind=kind, subject=subject, principal=principal, action=action)
    with control.database.read() as session:
        return events(session, wanted, limit, cursor)
