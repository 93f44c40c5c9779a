"""The file of API key hashes: one `NAME sha256:HEX [admin]` a line. Keys themselves are never in it."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from typing import TYPE_CHECKING

from serving.config import ApiKeyHash
from serving.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_LINE = re.compile(r"(?P<name>\S+)\s+sha256:(?P<hash>[0-9a-f]{64})(?P<admin>\s+admin)?")
_NAME = re.compile(r"[\w.@-]{1,64}")
_KEY_BYTES = 32


def read_key_file(path: Path) -> tuple[ApiKeyHash, ...]:
    """The keys in a file; empty lines and lines that begin with `#` are skipped.

    Raises:
        ConfigError: If the file cannot be read, has a bad line, or no key at all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--api-key-file {path}: {error}") from None
    return parse_keys(content, path)


def parse_keys(content: bytes, path: Path) -> tuple[ApiKeyHash, ...]:
    """The keys in the bytes of a key file; `path` is for messages.

    Raises:
        ConfigError: If there is a bad line, or no key at all.
    """
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--api-key-file {path}: {error}") from None
    keys = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(
                f"--api-key-file {path}, line {number}: write NAME sha256:HEX [admin], "
                "or make the line with: headrace keys create --file FILE"
            )
        is_admin = match["admin"] is not None
        keys.append(ApiKeyHash(name=match["name"], sha256_hex=match["hash"], is_admin=is_admin))
    if not keys:
        raise ConfigError(f"--api-key-file {path}: it holds no key; headrace keys create makes one")
    return tuple(keys)


def create_key(path: Path, name: str, *, is_admin: bool = False) -> str:
    """Makes a key, appends its hash to the file (mode 600) and returns the key itself.

    Args:
        path: Made where it does not exist.
        name: For logs and metrics; letters, digits and `._@-`.
        is_admin: Whether it may change the platform.

    Raises:
        ConfigError: If the name is unusable or taken, or the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name}: use 1 to 64 letters, digits or . _ @ -")
    line_end = ""
    if path.exists() and path.stat().st_size:
        if any(k.name == name for k in read_key_file(path)):
            raise ConfigError(f"--name {name}: the file has a key of this name; choose another")
        line_end = "" if path.read_bytes().endswith(b"\n") else "\n"
    key = f"hr-{secrets.token_urlsafe(_KEY_BYTES)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(f"{line_end}{name} sha256:{digest}{' admin' if is_admin else ''}\n")
    except OSError as error:
        raise ConfigError(f"--file {path}: {error.strerror}") from None
    return key
