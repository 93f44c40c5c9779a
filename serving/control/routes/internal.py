"""What gateways ask for and tell; never relayed to clients.

Owns the long poll's bounds. The snapshot's JSON is made once for all gateways, by the publisher.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from serving.control.context import Control, TheControl
from serving.control.epochs import renew_if_behind
from serving.control.errors import NotFound, NotLeading
from serving.control.shapes.common import Shape
from serving.control.tables import VERSION_CHARS

if TYPE_CHECKING:
    from collections.abc import Coroutine

router = APIRouter(prefix="/internal/v1", include_in_schema=False)

MAX_REPORTED_VERSIONS = 10_000
Result = TypeVar("Result")
Count = Annotated[int, Field(ge=0, le=10**12)]
VersionText = Annotated[str, Field(max_length=VERSION_CHARS)]


class Traffic(Shape):
    """What one version has served since the last report."""

    requests: Count = 0
    tokens: Count = 0


class TrafficReport(Shape):
    """What one gateway has served since its last report."""

    gateway: str = Field(default="", max_length=200)
    versions: dict[VersionText, Traffic] = Field(max_length=MAX_REPORTED_VERSIONS)


class Demand(Shape):
    """A cold version that a request waits for."""

    version: VersionText


@router.get("/snapshot")
async def snapshot(
    request: Request,
    control: TheControl,
    gateway: Annotated[str, Query(min_length=1, max_length=200)],
    epoch: Annotated[str, Query(max_length=64)] = "",
    after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    wait_s: Annotated[float, Query(ge=0, le=600)] = 0.0,
) -> Response:
    """Answer the snapshot that follows `after`, at once or when there is one; 204 if none comes.

    `after` also says which snapshot the gateway has in effect.
    """
    _check_leading(control)
    publisher = control.publisher
    current = publisher.current
    if current.epoch == epoch and after > current.version:
        await anyio.to_thread.run_sync(renew_if_behind, control.database, epoch, after)
        await publisher.refresh()
    wait_s = min(wait_s, control.settings.limits.max_wait_s)
    acked = after if epoch == publisher.current.epoch else 0
    with control.waiting(), control.acks.polling(gateway, acked):
        found = await _unless_gone(request, publisher.after(epoch, after, wait_s))
    if found is None:
        return Response(status_code=204)
    return Response(found.body, media_type="application/json")


@router.post("/traffic", status_code=204)
async def traffic(report: TrafficReport, control: TheControl) -> None:
    """Count what a gateway has served."""
    _check_leading(control)
    for version, served in report.versions.items():
        control.traffic.add(version, served.requests, served.tokens)


@router.post("/demand", status_code=204)
async def demand(wanted: Demand, control: TheControl) -> None:
    """Have a cold version loaded; 404 tells the gateway that nobody will."""
    _check_leading(control)
    if wanted.version not in control.publisher.current.published.versions:
        raise NotFound(f"There is no version '{wanted.version}'.", code="version_not_found")
    control.traffic.ask(wanted.version)


def _check_leading(control: Control) -> None:
    """One process hears of all gateways, or it could not tell that they all have a snapshot."""
    if control.leadership.is_standby:
        raise NotLeading("Another control plane leads: ask that one.")


async def _unless_gone(request: Request, waiting: Coroutine[None, None, Result]) -> Result | None:
    """The result, or None once the caller has hung up: nobody would read it."""
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(waiting)
        leaving = group.create_task(_gone(request))
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        answer.cancel()
        leaving.cancel()
    return None if answer.cancelled() else answer.result()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
