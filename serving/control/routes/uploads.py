"""Registration of versions, and the linter alone: the same bodies.

Bodies are read by `uploads.py`, not by FastAPI, which would hold a form in memory or in files of its
own; the OpenAPI document says here what they are.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from serving.control.context import TheCaller, TheControl
from serving.control.shapes.adapters import (
    LintAnswer,
    RegisteredVersion,
    SourceUpload,
    UploadOptions,
)
from serving.control.shapes.common import NamePath, errors
from serving.control.uploads import parse_labels

router = APIRouter(prefix="/admin/v1/adapters", tags=["adapters"])

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": (
            "A tar or tar.gz of the adapter's folder; or its files as a form, with the options as "
            "fields; or the address of files that lie elsewhere."
        ),
        "content": {
            "application/x-tar": _BINARY,
            "application/gzip": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                    "additionalProperties": {"type": "string"},
                }
            },
            "application/json": {
                "schema": SourceUpload.model_json_schema(),
                "examples": {
                    "bucket": {"value": {"source": "s3://models/support", "alias": "support"}}
                },
            },
        },
    }
}


def _options(
    alias: Annotated[str | None, Query(max_length=96, description="Point it there.")] = None,
    parent: Annotated[
        str | None, Query(max_length=109, description="Version that it was trained from.")
    ] = None,
    owner: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    label: Annotated[
        list[str] | None, Query(max_length=64, description="KEY=VALUE; repeat it.")
    ] = None,
    base: Annotated[
        str | None,
        Query(max_length=256, description="Base model; needed where several are served."),
    ] = None,
    scan: Annotated[bool, Query(description="Look for NaN and for zeros.")] = True,
    allow_no_effect: Annotated[bool, Query(description="Take one that changes nothing.")] = False,
    allow_unfaithful: Annotated[
        bool, Query(description="Take one that engines compute differently from its training.")
    ] = False,
) -> UploadOptions:
    return UploadOptions(
        alias=alias,
        parent=parent,
        owner=owner,
        labels=parse_labels(label or ()),
        base=base,
        scan=scan,
        allow_no_effect=allow_no_effect,
        allow_unfaithful=allow_unfaithful,
    )


Options = Annotated[UploadOptions, Depends(_options)]


@router.post(
    "/{name}/versions",
    summary="Register a version",
    status_code=201,
    responses={
        200: {"model": RegisteredVersion, "description": "The same content was registered before."},
        **errors(409, 413, 415),
    },
    openapi_extra=_BODY,
)
async def register(
    name: NamePath,
    request: Request,
    options: Options,
    control: TheControl,
    caller: TheCaller,
    response: Response,
) -> RegisteredVersion:
    """Register an adapter version, and point an alias at it if one is named.

    The linter judges it for the fleet's engines first; what none of them can serve is refused with
    each engine's reason. Nothing is kept of what is refused.
    """
    upload = await control.uploads.take(request, name, options)
    with upload.staged as staged:
        answer = await control.uploads.run(
            lambda: control.registration.register(staged, upload.options, caller)
        )
    await control.settle()
    response.status_code = 201 if answer.is_new else 200
    return answer


@router.post("/lint", summary="Lint an adapter", responses=errors(413, 415), openapi_extra=_BODY)
async def lint(request: Request, options: Options, control: TheControl) -> LintAnswer:
    """Say which engines of the fleet can serve an adapter, and keep nothing of it."""
    upload = await control.uploads.take(request, None, options)
    with upload.staged as staged:
        return await control.uploads.run(lambda: control.registration.lint(staged, upload.options))
