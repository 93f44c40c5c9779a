"""Whether a request is let in, decided on its head alone, before its body is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import (
    BodyTooLarge,
    HeadTooLarge,
    MalformedHttp,
    MethodNotAllowed,
    UnknownPath,
    UriTooLong,
)
from serving.gateway.endpoints import LOCAL, MODELS, OPEN, RELAYED, STORED_PREFIX, STORED_RESPONSE
from serving.gateway.framing import CHUNKED

if TYPE_CHECKING:
    from serving.config import Limits
    from serving.gateway.auth import ApiKeys
    from serving.gateway.request import Request

_MAX_SHOWN_CHARS = 200
SERVER_WIDE = b"*"
"""Target of an OPTIONS that asks about the server as a whole; answered without a key."""


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
    _check_size(request, head_bytes, limits)
    check_host_and_framing(request)
    if request.target == SERVER_WIDE and request.method == b"OPTIONS":
        request.path = request.target.decode()
        return
    path = request.path = _path_of(request.target)
    request.endpoint = STORED_RESPONSE if path.startswith(STORED_PREFIX) else RELAYED.get(path)
    if path not in OPEN:
        api_keys.check(request.headers)
    method, allowed = request.method.decode(), allowed_methods(path)
    if not allowed:
        shown = f"{method} {path[:_MAX_SHOWN_CHARS]}"
        raise UnknownPath(f"Unknown request URL: {shown}. Check it for typos.")
    if method not in allowed.split(", "):
        raise _not_allowed(request, allowed)
    if method == "OPTIONS":
        request.endpoint = None
    length = request.headers.get(b"content-length")
    if length is not None and int(length) > limits.max_body_bytes:
        raise body_too_large(limits)


def _check_size(request: Request, head_bytes: int, limits: Limits) -> None:
    if len(request.target) > limits.max_target_bytes:
        raise UriTooLong(f"The request target exceeds {limits.max_target_bytes} bytes.")
    if head_bytes > limits.max_head_bytes and _size(request) > limits.max_head_bytes:
        raise head_too_large(limits)


def check_host_and_framing(request: Request) -> None:
    """Refuses what proxies before us could understand in another way (RFC 9112, 3.2 and 6.1).

    The parser has refused both lengths at once, repeated ones and `chunked` that is not last.

    Raises:
        MalformedHttp: If there is no host, or a transfer coding other than `chunked`.
    """
    headers = request.headers
    if b"host" not in headers and not request.is_http10:
        raise MalformedHttp("The request has no Host header.")
    coding = headers.get(b"transfer-encoding")
    if coding is not None and (request.is_http10 or coding != CHUNKED):
        raise MalformedHttp("The only transfer coding is 'chunked', in HTTP/1.1.")


def allowed_methods(path: str) -> str:
    """What `Allow` says of a path; empty if there is no such route."""
    if path in RELAYED:
        return "POST, OPTIONS"
    if path.startswith(STORED_PREFIX):
        return "POST, OPTIONS" if path.endswith("/cancel") else "GET, DELETE, OPTIONS"
    if path in LOCAL or path.startswith(f"{MODELS}/"):
        return "GET, HEAD, OPTIONS"
    return "GET, HEAD, POST, OPTIONS" if path == SERVER_WIDE.decode() else ""


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
