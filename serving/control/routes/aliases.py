"""`/admin/v1/aliases`: public model names and where they point."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from serving.control.context import Control, TheCaller, TheControl, TheExpected
from serving.control.revisions import Expected, etag
from serving.control.shapes.aliases import (
    AliasAnswer,
    AliasChangeAnswer,
    AliasState,
    PutAlias,
    RollbackAlias,
)
from serving.control.shapes.common import (
    DEFAULT_PAGE,
    AliasPath,
    Cursor,
    Deleted,
    Limit,
    Page,
    errors,
)

router = APIRouter(prefix="/admin/v1/aliases", tags=["aliases"])

LOOK_AGAIN_S = 0.5
WaitS = Annotated[
    float, Query(ge=0, le=60, description="Seconds to wait for a flip to succeed or fail.")
]
_PENDING: dict[int | str, dict[str, Any]] = {
    202: {
        "model": AliasAnswer,
        "description": "The version is being loaded and proven; the alias keeps its target.",
    }
}
_CREATED: dict[int | str, dict[str, Any]] = {
    201: {"model": AliasAnswer, "description": "The alias is new."}
}


@router.get("", summary="List aliases", responses=errors())
def list_aliases(
    control: TheControl,
    target: Annotated[
        str | None, Query(max_length=256, description="Only those that refer to this.")
    ] = None,
    limit: Limit = DEFAULT_PAGE,
    cursor: Cursor = None,
) -> Page[AliasAnswer]:
    """List aliases by name, a page at a time."""
    return control.aliases.page(target, limit, cursor)


@router.get("/{alias}", summary="Show an alias", responses=errors(404))
def show_alias(alias: AliasPath, control: TheControl, response: Response) -> AliasAnswer:
    """Show where an alias points and what it waits for."""
    answer = control.aliases.get(alias)
    response.headers["etag"] = etag(answer.revision)
    return answer


@router.put(
    "/{alias}",
    summary="Point an alias",
    responses={**_CREATED, **_PENDING, **errors(404, 409, 412, 413)},
)
async def put_alias(
    alias: AliasPath,
    wanted: PutAlias,
    control: TheControl,
    caller: TheCaller,
    expected: TheExpected,
    response: Response,
    wait_s: WaitS = 0.0,
) -> AliasAnswer:
    """Point an alias at a version or a base model.

    A base model, or a version proven on enough replicas, is taken at once (200). Another version is
    loaded and proven first (202), unless the alias is new (201): then its first requests wait for it.
    """
    known = Expected(wanted.revision, expected.if_match, expected.if_none_match)
    answer, is_new = await control.in_thread(
        lambda: control.aliases.put(alias, wanted, known, caller)
    )
    return await _finish(control, answer, wait_s, response, 201 if is_new else 200)


@router.post(
    "/{alias}/rollback",
    summary="Roll an alias back",
    responses={**_PENDING, **errors(404, 409, 412, 413)},
)
async def rollback_alias(
    alias: AliasPath,
    control: TheControl,
    caller: TheCaller,
    expected: TheExpected,
    response: Response,
    wanted: RollbackAlias | None = None,
    wait_s: WaitS = 0.0,
) -> AliasAnswer:
    """Undo the last change: give up a flip that waits, else go to the target before.

    It is a flip like any other. A second rollback undoes the first.
    """
    revision = None if wanted is None else wanted.revision
    known = Expected(revision, expected.if_match, expected.if_none_match)
    answer = await control.in_thread(lambda: control.aliases.rollback(alias, known, caller))
    return await _finish(control, answer, wait_s, response, 200)


@router.delete("/{alias}", summary="Delete an alias", responses=errors(404, 412))
async def delete_alias(
    alias: AliasPath, control: TheControl, caller: TheCaller, expected: TheExpected
) -> Deleted:
    """Delete an alias; its history stays, and so does what it pointed at."""
    await control.in_thread(lambda: control.aliases.delete(alias, expected, caller))
    await control.settle()
    return Deleted(id=alias)


@router.get("/{alias}/history", summary="Show an alias's history", responses=errors(404))
def alias_history(
    alias: AliasPath, control: TheControl, limit: Limit = DEFAULT_PAGE, cursor: Cursor = None
) -> Page[AliasChangeAnswer]:
    """List every change of an alias, the newest first."""
    return control.aliases.history(alias, limit, cursor)


async def _finish(
    control: Control, answer: AliasAnswer, wait_s: float, response: Response, status: int
) -> AliasAnswer:
    """Wait for the flip if asked to, then for the gateways."""
    await control.settle()
    if answer.state is AliasState.PENDING and wait_s:
        with control.waiting():
            answer = await _decided(control, answer, wait_s)
        await control.settle()
    response.status_code = 202 if answer.state is AliasState.PENDING else status
    response.headers["etag"] = etag(answer.revision)
    return answer


async def _decided(control: Control, answer: AliasAnswer, wait_s: float) -> AliasAnswer:
    """The alias once it waits no more, or as it is when the time is up."""
    end_s = time.monotonic() + wait_s
    name = answer.alias
    publisher = control.publisher
    while answer.state is AliasState.PENDING and (left_s := end_s - time.monotonic()) > 0:
        if publisher.is_closing:
            break
        await publisher.committed(min(left_s, LOOK_AGAIN_S))
        answer = await control.in_thread(lambda: control.aliases.get(name))
    return answer
