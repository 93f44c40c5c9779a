"""Who may call: everybody with the token, and only they; and whose name goes into the audit.

Owns the check of `Authorization` and of `x-headrace-principal`. The gateway authenticates people and
tells their name; whoever has the token is trusted to. Runs before any route.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from serving.control.error_answers import error_response
from serving.control.errors import Unauthorised
from serving.control.tables import PRINCIPAL_CHARS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PRINCIPAL_HEADER = "x-headrace-principal"
DEFAULT_PRINCIPAL = "operator"
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")


class TokenAuth:
    """ASGI middleware that answers 401 without the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        """Guard an app.

        Args:
            app: What is guarded.
            token: What callers have to present.
        """
        self._app = app
        self._digest = hashlib.sha256(token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._is_known(headers.get("authorization", "")):
            error = Unauthorised("Send the control plane's token: 'Authorization: Bearer TOKEN'.")
            await error_response(error, {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        scope.setdefault("state", {})["principal"] = _principal(headers)
        await self._app(scope, receive, send)

    def _is_known(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        # Digests have one length: the comparison takes the same time for every wrong token.
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == "bearer"


def _principal(headers: Headers) -> str:
    given = _NOT_PRINTABLE.sub("?", headers.get(PRINCIPAL_HEADER, "")).strip()
    return given[:PRINCIPAL_CHARS] or DEFAULT_PRINCIPAL
