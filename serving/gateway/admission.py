"""Whether a request is let in, decided on its head alone, before its body is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import (
    BodyTooLarge,
    HeadTooLarge,
    MalformedHttp,
    MethodNotAllowed,
    NoControlPlane,
    PermissionDenied,
    UnknownPath,
    UriTooLong,
)
from serving.gateway.control_relay import check_control_path
from serving.gateway.endpoints import (
    CONTROL,
    CONTROL_METHODS,
    LOCAL,
    MODELS,
    OPEN,
    RELAYED,
    STORED_PREFIX,
    Endpoint,
    endpoint_of,
)
from serving.gateway.framing import CHUNKED

if TYPE_CHECKING:
    from serving.config import ApiKeyHash, GatewayConfig, Limits
    from serving.gateway.auth import ApiKeys
    from serving.gateway.request import Request

_MAX_SHOWN_CHARS = 200
SERVER_WIDE = b"*"
"""Target of an OPTIONS that asks about the server as a whole; answered without a key."""


def admit(request: Request, head_bytes: int, config: GatewayConfig, api_keys: ApiKeys) -> None:
    """Finds the route of a request and authenticates it.

    Args:
        request: Its head is complete; gets its `path` and `endpoint`.
        head_bytes: Upper bound of the head's size: what was received since it began.
        config: Of the gateway.
        api_keys: Who may come in.

    Raises:
        ServingError: If the request is refused, whatever its body.
    """
    limits = config.limits
    _check_size(request, head_bytes, limits)
    check_host_and_framing(request)
    if request.target == SERVER_WIDE and request.method == b"OPTIONS":
        request.path = request.target.decode()
        return
    path = request.path = _path_of(request.target)
    request.endpoint = endpoint = endpoint_of(path)
    key = None if path in OPEN else api_keys.check(request.headers)
    if endpoint is not None and endpoint.kind == "control":
        _admit_to_control(request, endpoint, config, key)
    method, allowed = request.method.decode(), allowed_methods(path)
    if not allowed:
        shown = f"{method} {path[:_MAX_SHOWN_CHARS]}"
        raise UnknownPath(f"Unknown request URL: {shown}. Check it for typos.")
    if method not in allowed.split(", "):
        raise _not_allowed(request, allowed)
    if method == "OPTIONS" and (_is_preflight(request) or endpoint not in CONTROL):
        request.endpoint = None
    length = request.headers.get(b"content-length")
    bound_bytes = max_body_bytes(request.endpoint, limits)
    if length is not None and int(length) > bound_bytes:
        raise body_too_large(bound_bytes)


def _admit_to_control(
    request: Request, endpoint: Endpoint, config: GatewayConfig, key: ApiKeyHash | None
) -> None:
    """Whether a request may go to the control plane; a preflight goes there never, and needs no key.

    Raises:
        ServingError: If it may not.
    """
    check_control_path(request.path)
    if config.control is None:
        raise NoControlPlane(
            "This gateway has no control plane: start it with one (HEADRACE_CONTROL_URL)."
        )
    if _is_preflight(request):
        return
    if key is not None:
        request.principal = key.name
        if endpoint.needs_admin and not key.is_admin:
            raise PermissionDenied("This route needs an admin key.")
    elif endpoint.needs_admin and not config.listen.is_loopback:
        raise PermissionDenied(
            "This route needs an admin key, and this gateway has no keys: "
            "headrace keys create --admin makes one."
        )
    elif b"origin" in request.headers and b"access-control-allow-origin" not in request.extra_head:
        # Without keys, every page that a browser on this machine shows could change the platform.
        raise PermissionDenied("Web pages of this origin may not call this route.")


def _is_preflight(request: Request) -> bool:
    """Whether it only asks what a browser may send; with settings for that or without."""
    return request.method == b"OPTIONS" and b"access-control-request-method" in request.headers


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
    if endpoint_of(path) in CONTROL:
        return CONTROL_METHODS
    if path.startswith(STORED_PREFIX):
        return "POST, OPTIONS" if path.endswith("/cancel") else "GET, DELETE, OPTIONS"
    if path in LOCAL or path.startswith(f"{MODELS}/"):
        return "GET, HEAD, OPTIONS"
    return "GET, HEAD, POST, OPTIONS" if path == SERVER_WIDE.decode() else ""


def max_body_bytes(endpoint: Endpoint | None, limits: Limits) -> int:
    """The bound on a body, by what becomes of it."""
    if endpoint is None or endpoint.kind == "json":
        return limits.max_body_bytes
    return limits.max_upload_bytes if endpoint.kind == "form" else limits.max_admin_body_bytes


def body_too_large(bound_bytes: int) -> BodyTooLarge:
    """413."""
    return BodyTooLarge(f"The request body exceeds the limit of {bound_bytes} bytes.")


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
