"""Bodies of the audit routes."""

from __future__ import annotations

from typing import Any

from serving.control.shapes.common import Shape


class AuditAnswer(Shape):
    """One change."""

    id: int
    at: float
    """Unix time."""
    principal: str
    request_id: str
    action: str
    kind: str
    subject: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
