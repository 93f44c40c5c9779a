"""Names: of an adapter, of one version of it, of an alias.

Owns the grammar and its reasons. Never looks anything up. Used by whatever names an adapter.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NewType

from adapters.errors import InvalidName

AdapterName = NewType("AdapterName", str)
AliasName = NewType("AliasName", str)
Digest = NewType("Digest", str)
"""SHA-256 of a version's content: 64 lower-case hexadecimal digits."""

DIGEST_CHARS = 64
SHORT_DIGEST_CHARS = 12
MAX_NAME_CHARS = 96
# No "@" (separates the digest), no ":" (SGLang splits model names there), no "/" or leading dot
# (names become folders).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SHORT = re.compile(r"[0-9a-f]{12}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class VersionName(NamedTuple):
    """`name@digest12`: what clients read as `model` and what engines call the version."""

    adapter: AdapterName
    short_digest: str

    def __str__(self) -> str:
        """Return `name@digest12`."""
        return f"{self.adapter}@{self.short_digest}"


def adapter_name(text: str) -> AdapterName:
    """Check the name of an adapter.

    Raises:
        InvalidName: If it breaks the grammar.
    """
    return AdapterName(_checked(text, "adapter"))


def alias_name(text: str) -> AliasName:
    """Check the name of an alias: the grammar of adapter names.

    Raises:
        InvalidName: If it breaks the grammar.
    """
    return AliasName(_checked(text, "alias"))


def version_name(adapter: str, digest: str) -> VersionName:
    """Name the version of an adapter with some content.

    Raises:
        InvalidName: If the name or the digest breaks its grammar.
    """
    if not _DIGEST.fullmatch(digest):
        raise InvalidName(f"'{digest[:80]}' is not a SHA-256 digest in hexadecimal.")
    return VersionName(adapter_name(adapter), digest[:SHORT_DIGEST_CHARS])


def parse_version(text: str) -> VersionName:
    """Read `name@digest12`; a full digest is shortened.

    Raises:
        InvalidName: If the text is not of that form.
    """
    name, separator, digest = text.partition("@")
    if not separator or not (_SHORT.fullmatch(digest) or _DIGEST.fullmatch(digest)):
        raise InvalidName(
            f"'{text[:120]}' is not a version: write NAME@DIGEST with the first 12 hexadecimal "
            "digits of its digest."
        )
    return VersionName(adapter_name(name), digest[:SHORT_DIGEST_CHARS])


def _checked(text: str, what: str) -> str:
    if not _NAME.fullmatch(text):
        raise InvalidName(
            f"'{text[:120]}' cannot name an {what}: use letters, digits, '.', '_' and '-', "
            f"{MAX_NAME_CHARS} at most, a letter or digit first."
        )
    return text
