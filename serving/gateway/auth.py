"""API keys: who may use the gateway.

Keeps SHA-256 hashes only. Keys have 256 random bits (`headrace keys create`), so a fast hash is
enough: there is nothing to guess from (OWASP, "Password storage", excludes random tokens).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from serving.errors import Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from serving.config import ApiKeyHash

_BEARER = b"bearer "


class ApiKeys:
    """The known keys, by hash. Without any, every request is let in."""

    __slots__ = ("_digests",)

    def __init__(self, keys: Iterable[ApiKeyHash]) -> None:
        self._digests = {bytes.fromhex(key.sha256_hex): key for key in keys}

    def check(self, headers: Mapping[bytes, bytes]) -> ApiKeyHash | None:
        """Authenticates a request head.

        The look-up goes by the digest of what was presented: its timing tells about hashes, from
        which no key follows. The final compare is constant-time all the same.

        Args:
            headers: Lower-case names.

        Returns:
            What is known of the key, or None where no keys are set.

        Raises:
            Unauthenticated: If there is no key, or not a known one.
        """
        if not self._digests:
            return None
        presented = _presented_key(headers)
        if not presented:
            raise Unauthenticated(
                "You didn't provide an API key. Send it in an Authorization header: "
                "'Authorization: Bearer YOUR_KEY'."
            )
        digest = hashlib.sha256(presented).digest()
        for known, key in self._digests.items():
            if hmac.compare_digest(known, digest):
                return key
        raise Unauthenticated("Incorrect API key provided.")


NO_KEYS = ApiKeys(())
"""Lets everybody in."""


def _presented_key(headers: Mapping[bytes, bytes]) -> bytes:
    """The bearer token, or what Anthropic's clients send as `x-api-key`; empty if neither."""
    authorization = headers.get(b"authorization")
    if authorization is not None and authorization[:7].lower() == _BEARER:
        return authorization[7:].strip()
    return headers.get(b"x-api-key", b"")
