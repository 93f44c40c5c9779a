"""Cross-origin requests: which pages of a browser may call the gateway (Fetch standard, "CORS").

Off unless configured, and then it costs nothing. Never decides who may call: API keys do. Called by
`client.py` for each request head, before anything can be refused, so that errors carry the headers
too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.config import Cors
    from serving.gateway.request import Request

_VARY = b"vary: origin\r\n"
_HEADER_NAMES = re.compile(
    rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*"
)
_ANY = "*"


class CorsRules:
    """The settings as header lines."""

    __slots__ = (
        "_allows_any",
        "_any_header",
        "_headers",
        "_max_age",
        "_methods",
        "_origins",
        "_shared",
    )

    def __init__(self, cors: Cors) -> None:
        self._allows_any = _ANY in cors.allowed_origins
        self._origins = frozenset(origin.encode() for origin in cors.allowed_origins)
        self._any_header = _ANY in cors.allowed_headers
        self._headers = ", ".join(cors.allowed_headers).encode()
        self._methods = ", ".join(cors.allowed_methods).encode()
        self._max_age = b"%d" % cors.max_age_s
        shared = b""
        if cors.allow_credentials:
            shared = b"access-control-allow-credentials: true\r\n"
        if cors.exposed_headers:
            names = ", ".join(cors.exposed_headers).encode()
            shared += b"access-control-expose-headers: %b\r\n" % names
        self._shared = shared

    def mark(self, request: Request) -> None:
        """Gives a request the lines that its response shall carry, whatever that becomes."""
        if self._allows_any:
            request.extra_head = b"access-control-allow-origin: *\r\n%b%b" % (self._shared, _VARY)
            return
        origin = request.headers.get(b"origin")
        if origin is None or origin.lower() not in self._origins:
            # Caches have to keep apart what this page gets and what an allowed one would.
            request.extra_head = _VARY
            return
        request.extra_head = b"access-control-allow-origin: %b\r\n%b%b" % (
            origin,
            self._shared,
            _VARY,
        )

    def is_preflight(self, request: Request) -> bool:
        """Whether a browser asks before it sends the request itself; it has no key to show."""
        headers = request.headers
        return (
            request.method == b"OPTIONS"
            and b"origin" in headers
            and b"access-control-request-method" in headers
        )

    def preflight_lines(self, request: Request) -> bytes:
        """What the answer says beside `mark`'s lines; nothing to an origin that is not allowed."""
        if request.extra_head == _VARY:
            return b""
        asked = request.headers.get(b"access-control-request-headers", b"")
        names = self._headers
        if self._any_header:
            # Named one by one: `*` does not cover `authorization`.
            names = asked if _HEADER_NAMES.fullmatch(asked) else b""
        lines = b"access-control-allow-methods: %b\r\naccess-control-max-age: %b\r\n" % (
            self._methods,
            self._max_age,
        )
        return lines + (b"access-control-allow-headers: %b\r\n" % names if names else b"")
