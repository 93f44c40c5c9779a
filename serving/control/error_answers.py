"""Every error as OpenAI's shape: ours, the adapters' package's, FastAPI's and what nobody expected.

Owns the mapping of exceptions to answers. Never decides what is an error.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from adapters.errors import (
    AdapterError,
    IncompatibleAdapter,
    InvalidName,
    StoreError,
    UploadRefused,
)
from serving.control.errors import InvalidRequest, StoreUnavailable, Unprocessable
from serving.errors import InternalError, ServingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from starlette.requests import Request

logger = logging.getLogger(__name__)

_CODES = {404: "unknown_url", 405: "method_not_supported", 415: "unsupported_media_type"}


def error_response(error: ServingError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the answer for an error.

    Args:
        error: What went wrong.
        headers: Sent beside `retry-after`.
    """
    sent = dict(headers or {})
    if error.retry_after_s is not None:
        sent["retry-after"] = str(error.retry_after_s)
    return JSONResponse(_body(error), status_code=error.status, headers=sent)


def install_handlers(app: FastAPI) -> None:
    """Have every error of the app answered in this shape."""
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(AdapterError, _on_adapter_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_surprise)


def _body(error: ServingError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def as_serving_error(error: AdapterError) -> ServingError:
    """Return what callers see of an error of the adapters' package."""
    if isinstance(error, StoreError):
        return StoreUnavailable(str(error))
    if isinstance(error, UploadRefused):
        refused = InvalidRequest(_sentence(error.message), code="invalid_upload")
        refused.status = error.status
        return refused
    if isinstance(error, InvalidName):
        return InvalidRequest(str(error), code="invalid_name")
    if isinstance(error, IncompatibleAdapter):
        return Unprocessable(str(error), code="incompatible_adapter")
    return InvalidRequest(str(error), code="invalid_adapter")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


async def _on_serving_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ServingError):
        raise error
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.warning("request failed", extra={"code": error.code, "cause": error.__cause__})
    return error_response(error)


async def _on_adapter_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, AdapterError):
        raise error
    return error_response(as_serving_error(error))


async def _on_invalid_request(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    problem = error.errors()[0]
    place = [str(step) for step in problem["loc"] if step not in ("body", "query", "path")]
    param = ".".join(place) or None
    if problem["type"] == "json_invalid":
        return error_response(InvalidRequest("The body is not valid JSON.", code="invalid_json"))
    text = f"{param}: {problem['msg']}" if param else str(problem["msg"])
    return error_response(Unprocessable(text, param=param, code="invalid_value"))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    # FastAPI wraps whatever is raised while it reads a body.
    if isinstance(error.__cause__, ServingError):
        return error_response(error.__cause__)
    found: ServingError = InvalidRequest(
        f"{request.method} {request.url.path[:200]}: {error.detail}.",
        code=_CODES.get(error.status_code),
    )
    found.status = error.status_code
    return error_response(found, error.headers)


async def _on_surprise(_request: Request, error: Exception) -> JSONResponse:
    logger.error("unexpected error", exc_info=error)
    return error_response(InternalError("The control plane failed; its log says why."))
