"""The folder of one version in a node's cache: putting a copy in place, measuring, removing.

Owns how these files change; whoever calls holds the version's lock where he changes something. Never
decides what stays. Called by `node_cache.py`.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

from adapters.locations import sync
from adapters.manifest import Manifest

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST_FILE = "manifest.json"
INCOMING = ".incoming-"


class CachedVersion(NamedTuple):
    """A version that lies here."""

    version: str
    """`name@digest12`."""
    size_bytes: int
    """Of all its copies, and of a download under way."""
    used_s: float
    """When it was last asked for, seconds since 1970."""


def settle(incoming: Path, copy: Path, manifest: Manifest) -> Path:
    """Put a complete download in place: whoever sees the copy sees all of it, after a power cut too.

    Raises:
        OSError: If the disk does not take it.
    """
    described = incoming.parent / f"{INCOMING}0-{MANIFEST_FILE}"
    described.write_bytes(manifest.to_bytes())
    sync(described)
    described.rename(incoming.parent / MANIFEST_FILE)
    for path in incoming.iterdir():
        path.chmod(0o444)
    incoming.chmod(0o755)
    incoming.rename(copy)
    copy.chmod(0o555)
    sync(copy.parent)
    return copy


def is_of(folder: Path, digest: str) -> bool:
    """Return whether a version's folder holds that digest; where its manifest is lost, its copies tell."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return True
    return manifest.digest == digest


def measured(folder: Path) -> CachedVersion | None:
    """Return a version's size and age, None if it has gone meanwhile."""
    size_bytes, used_s = 0, 0.0
    try:
        used_s = folder.stat().st_mtime
        for path in folder.iterdir():
            if path.name.startswith(INCOMING):
                size_bytes += int(path.name.split("-")[1])
            elif path.is_dir():
                size_bytes += sum(file.stat().st_size for file in path.iterdir())
            else:
                used_s = path.stat().st_mtime
    # Another process moves things about: a version that goes meanwhile needs no room.
    except OSError:
        if not folder.is_dir():
            return None
    return CachedVersion(folder.name, size_bytes, used_s)


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with everything in it, read-only or not."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # A read-only folder lets nobody but root remove what is in it.
    for folder in (path, *(each for each in path.rglob("*") if each.is_dir())):
        folder.chmod(0o755)
    shutil.rmtree(path, ignore_errors=True)
