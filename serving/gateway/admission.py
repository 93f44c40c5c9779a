"""Whether a request is let in, decided on its head alone, before its body is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import (
    BodyTooLarge,
    HeadTooLarge,
    MethodNotAllowed,
    UnknownPath,
    UriTooLong,
)
from serving.gateway.endpoints import LOCAL, MODELS, OPEN, RELAYED

if TYPE_CHECKING:
    from serving.config import Limits
    from serving.gateway.auth import ApiKeys
    from serving.gateway.request import Request

_MAX_SHOWN_CHARS = 200


def admit(request: Request, head_bytes: int, limits: Limits, api_keys: ApiKeys) -> None:
    """Finds the route of a request and authenticates it.

    Args:
        request: Its head is complete; gets its `path` and `endpoint`.
        head_bytes: Upper bound of the head's size: what was received since it began.
        limits: Of the worker.
        api_keys: Who may come in.

    Raises:
        ServingError: If the request is refused, whatever its body.
    """
    if len(request.target) > limits.max_target_bytes:
        raise UriTooLong(f"The request target exceeds {limits.max_target_bytes} bytes.")
    if head_bytes > limits.max_head_bytes and _size(request) > limits.max_head_bytes:
        raise head_too_large(limits)
    path = request.path = _path_of(request.target)
    request.endpoint = RELAYED.get(path)
    if path not in OPEN:
        api_keys.check(request.headers)
    if request.endpoint is not None:
        if request.method != b"POST":
            raise _not_allowed(request, "POST")
        length = request.headers.get(b"content-length")
        if length is not None and int(length) > limits.max_body_bytes:
            raise body_too_large(limits)
    elif path in LOCAL or path.startswith(f"{MODELS}/"):
        if request.method not in (b"GET", b"HEAD"):
            raise _not_allowed(request, "GET, HEAD")
    else:
        shown = f"{request.method.decode()} {path[:_MAX_SHOWN_CHARS]}"
        raise UnknownPath(f"Unknown request URL: {shown}. Check it for typos.")


def body_too_large(limits: Limits) -> BodyTooLarge:
    """413."""
    return BodyTooLarge(f"The request body exceeds the limit of {limits.max_body_bytes} bytes.")


def head_too_large(limits: Limits) -> HeadTooLarge:
    """431."""
    return HeadTooLarge(f"Request line and headers exceed {limits.max_head_bytes} bytes.")


def _path_of(target: bytes) -> str:
    """Path of a request target in origin or absolute form (RFC 9112, section 3.2)."""
    path = target.partition(b"?")[0].decode("latin-1")
    if path[:1] == "/":
        return path
    _, _, after_scheme = path.partition("://")
    return "/" + after_scheme.partition("/")[2]


def _size(request: Request) -> int:
    return len(request.target) + sum(
        len(name) + len(value) + 4 for name, value in request.headers.items()
    )


def _not_allowed(request: Request, allow: str) -> MethodNotAllowed:
    method = request.method.decode()
    return MethodNotAllowed(f"{method} is not allowed on {request.path}; use {allow}.", allow)
