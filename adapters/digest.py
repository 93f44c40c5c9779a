"""The digest of an adapter version: what its files hash to.

Owns the definition. Never reads anything but the file it is given; never decides which files count
(`kept_files.py` does). Used by intake, store and cache.

The digest is the SHA-256 of this text (UTF-8, each line ended by a line feed), files sorted by the
bytes of their path:

    headrace.adapter.files/1
    <sha256 of the file, hexadecimal> <size in bytes> <path>
    ...
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from adapters.manifest import FileEntry
from adapters.version import Digest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

DIGEST_FORMAT = "headrace.adapter.files/1"
BLOCK_BYTES = 1024 * 1024


def digest_of(files: Iterable[FileEntry]) -> Digest:
    """Return the digest of a version that has these files, in whichever order they come."""
    lines = sorted((entry.path.encode(), entry) for entry in files)
    text = [f"{entry.sha256_hex} {entry.size_bytes} {entry.path}\n" for _, entry in lines]
    return Digest(hashlib.sha256("".join([f"{DIGEST_FORMAT}\n", *text]).encode()).hexdigest())


def entry_of(path: Path) -> FileEntry:
    """Hash a file that lies at the root of its adapter's folder.

    Raises:
        OSError: If it cannot be read.
    """
    sha256, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha256.update(block)
            size_bytes += len(block)
    return FileEntry(path=path.name, size_bytes=size_bytes, sha256_hex=sha256.hexdigest())
