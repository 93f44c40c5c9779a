"""`/admin/v1/adapters`: reading, describing and deleting what is registered."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from serving.control.adapter_queries import AdapterFilter
from serving.control.context import TheCaller, TheControl, TheExpected
from serving.control.revisions import Expected, etag
from serving.control.shapes.adapters import (
    AdapterAnswer,
    PatchAdapter,
    VersionAnswer,
    VersionSummary,
)
from serving.control.shapes.common import (
    DEFAULT_PAGE,
    Cursor,
    Deleted,
    Limit,
    NamePath,
    Page,
    errors,
)

router = APIRouter(prefix="/admin/v1/adapters", tags=["adapters"])

DigestPath = Annotated[
    str, Path(max_length=64, description="The digest, or its first 12 digits or more.")
]


@router.get("", summary="List adapters", responses=errors())
def list_adapters(
    control: TheControl,
    query: Annotated[
        str | None, Query(max_length=96, description="Part of the name or of the owner.")
    ] = None,
    owner: Annotated[str | None, Query(max_length=200)] = None,
    label: Annotated[
        list[str] | None, Query(max_length=16, description="KEY=VALUE, or KEY; repeat it.")
    ] = None,
    base: Annotated[str | None, Query(max_length=256, description="Base model.")] = None,
    include_deleted: Annotated[bool, Query(description="List deleted ones too.")] = False,
    limit: Limit = DEFAULT_PAGE,
    cursor: Cursor = None,
) -> Page[AdapterAnswer]:
    """List adapters by name, a page at a time; all filters have to hold."""
    wanted = AdapterFilter(query, owner, label or (), base, include_deleted)
    return control.registry.page(wanted, limit, cursor)


@router.get("/{name}", summary="Show an adapter", responses=errors(404))
def show_adapter(name: NamePath, control: TheControl, response: Response) -> AdapterAnswer:
    """Show an adapter with its newest version."""
    answer = control.registry.get(name)
    response.headers["etag"] = etag(answer.revision)
    return answer


@router.patch("/{name}", summary="Describe an adapter", responses=errors(404, 409, 412, 413))
def patch_adapter(
    name: NamePath,
    changes: PatchAdapter,
    control: TheControl,
    caller: TheCaller,
    expected: TheExpected,
    response: Response,
) -> AdapterAnswer:
    """Change owner, description or labels."""
    wanted = Expected(changes.revision, expected.if_match, expected.if_none_match)
    answer = control.registry.describe(name, changes, wanted, caller)
    response.headers["etag"] = etag(answer.revision)
    return answer


@router.delete("/{name}", summary="Delete an adapter", responses=errors(404, 409, 412))
async def delete_adapter(
    name: NamePath, control: TheControl, caller: TheCaller, expected: TheExpected
) -> Deleted:
    """Delete an adapter with all its versions; pushing one of them again brings it back."""
    await control.in_thread(lambda: control.registry.delete(name, expected, caller))
    await control.settle()
    return Deleted(id=name)


@router.get("/{name}/versions", summary="List versions", responses=errors(404))
def list_versions(
    name: NamePath,
    control: TheControl,
    include_deleted: Annotated[bool, Query(description="List deleted ones too.")] = False,
    limit: Limit = DEFAULT_PAGE,
    cursor: Cursor = None,
) -> Page[VersionSummary]:
    """List the versions of an adapter, the newest first."""
    return control.registry.versions(name, include_deleted, limit, cursor)


@router.get("/{name}/versions/{digest}", summary="Show a version", responses=errors(404))
def show_version(name: NamePath, digest: DigestPath, control: TheControl) -> VersionAnswer:
    """Show a version with its manifest and what the linter said of it."""
    return control.registry.version(name, digest)


@router.delete("/{name}/versions/{digest}", summary="Delete a version", responses=errors(404, 409))
async def delete_version(
    name: NamePath, digest: DigestPath, control: TheControl, caller: TheCaller
) -> Deleted:
    """Delete a version that no alias needs; pushing it again brings it back."""
    deleted = await control.in_thread(lambda: control.registry.delete_version(name, digest, caller))
    await control.settle()
    return Deleted(id=deleted)
