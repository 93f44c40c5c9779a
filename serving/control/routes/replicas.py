"""`/admin/v1/replicas` and `/admin/v1/versions`: where versions are, and trying again."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from serving.control.context import TheCaller, TheControl
from serving.control.replicas import placements_of, replicas, retry
from serving.control.shapes.common import errors
from serving.control.shapes.replicas import (
    GatewayAnswer,
    PlacementAnswer,
    PlacementList,
    ReplicaList,
)

router = APIRouter(prefix="/admin/v1", tags=["replicas"])

ReplicaPath = Annotated[str, Path(max_length=255, description="`host:port` of the replica.")]
VersionPath = Annotated[str, Path(max_length=170, description="`name@digest12`.")]


@router.get("/replicas", summary="List replicas", responses=errors())
async def list_replicas(control: TheControl) -> ReplicaList:
    """List the replicas with the versions on each, and the gateways that follow."""
    answers = await control.in_thread(lambda: replicas(control.database, control.engines))
    gateways = [
        GatewayAnswer(
            gateway=ack.gateway, snapshot_version=ack.version, heard_s_ago=ack.heard_s_ago
        )
        for ack in control.acks.live()
    ]
    newest = control.publisher.current.version
    return ReplicaList(data=answers, gateways=gateways, snapshot_version=newest)


@router.post(
    "/replicas/{replica}/versions/{version}/retry",
    summary="Retry a version on a replica",
    responses=errors(404, 409),
)
async def retry_version(
    replica: ReplicaPath, version: VersionPath, control: TheControl, caller: TheCaller
) -> PlacementAnswer:
    """Have a version that failed on a replica loaded again now."""
    answer = await control.in_thread(lambda: retry(control.database, replica, version, caller))
    control.wake()
    return answer


@router.get(
    "/versions/{version}/placements", summary="Show where a version is", responses=errors(404)
)
def list_placements(version: VersionPath, control: TheControl) -> PlacementList:
    """List the replicas that have a version, with its state on each."""
    return PlacementList(data=placements_of(control.database, version))
