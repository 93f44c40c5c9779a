"""What several routes share: errors, pages, names in paths."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict

from adapters.version import MAX_NAME_CHARS

MAX_PAGE = 200
DEFAULT_PAGE = 50
MAX_CURSOR_CHARS = 400

Item = TypeVar("Item")


class Shape(BaseModel):
    """Base of the bodies: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ErrorDetail(Shape):
    """What went wrong, as OpenAI's API says it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Shape):
    """Body of every answer that is not 2xx; its `x-request-id` names the request in the logs."""

    error: ErrorDetail


class Page(Shape, Generic[Item]):
    """Part of a list; `next_cursor` asks for the next part and is null on the last."""

    data: list[Item]
    next_cursor: str | None = None


class Deleted(Shape):
    """Something was deleted."""

    id: str
    deleted: bool = True


NamePath = Annotated[str, Path(max_length=MAX_NAME_CHARS, description="Name of the adapter.")]
AliasPath = Annotated[str, Path(max_length=MAX_NAME_CHARS, description="Name of the alias.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Length of the page.")]
Cursor = Annotated[
    str | None,
    Query(max_length=MAX_CURSOR_CHARS, description="`next_cursor` of the page before."),
]

_MEANINGS = {
    400: ("The request cannot be read, or a name breaks its grammar.", "invalid_request"),
    401: ("No token, or a wrong one.", "invalid_token"),
    404: ("What the request names does not exist.", "not_found"),
    409: ("It contradicts the state: a stale revision, or something in use.", "conflict"),
    412: ("`If-Match` or `If-None-Match` does not hold.", "precondition_failed"),
    413: ("The body, or what it unpacks to, is too large.", "request_too_large"),
    415: ("The body's type is not one that the route takes.", "unsupported_media_type"),
    422: ("A value is out of bounds, or what is asked for cannot be done.", "unprocessable"),
    503: ("The database or the store does not answer, or too much is asked at once.", "overloaded"),
}
ALWAYS = (400, 401, 422, 503)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error answers of a route for the OpenAPI document, those of every route included."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*ALWAYS, *statuses}):
        meaning, code = _MEANINGS[status]
        detail = {"message": meaning, "type": "invalid_request_error", "param": None, "code": code}
        example = {"application/json": {"example": {"error": detail}}}
        answers[status] = {"model": ErrorAnswer, "description": meaning, "content": example}
    return answers
