"""`/healthz`, `/readyz` and `/metrics` of the control plane itself."""

from __future__ import annotations

from fastapi import APIRouter, Response

from serving.control.context import TheControl
from serving.control.errors import NotLeading
from serving.control.metrics import CONTENT_TYPE
from serving.control.shapes.common import Shape

router = APIRouter(include_in_schema=False)


class Health(Shape):
    """Whether the control plane works."""

    status: str
    """`ok`, or `degraded` while the database does not answer."""
    snapshot_version: int


@router.get("/healthz")
async def healthz(control: TheControl) -> Health:
    """Say whether this process works; 200 also while it waits for the database."""
    status = "ok" if control.publisher.is_fresh else "degraded"
    return Health(status=status, snapshot_version=control.publisher.current.version)


@router.get("/readyz")
async def readyz(control: TheControl) -> Health:
    """Say whether gateways may follow this process; 503 while another one leads."""
    if control.leadership.is_standby:
        raise NotLeading("Another control plane leads.")
    return await healthz(control)


@router.get("/metrics")
async def metrics(control: TheControl) -> Response:
    """Everything that is counted, in Prometheus's format."""
    counted = control.metrics
    counted.database_up.set(control.publisher.is_fresh)
    counted.snapshot_version.set(control.publisher.current.version)
    counted.gateways.set(len(control.acks.live()))
    return Response(counted.exposition(), media_type=CONTENT_TYPE)
