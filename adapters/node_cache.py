"""The adapter versions that lie on this node, for its engines to read.

Owns one root folder: what is in it, its size, and who may write when. Never decides what runs here: an
engine reads a copy for as long as it lives, so a version goes only when its caller says that nobody
names it. Called by the control plane and by node agents, by thread and by several processes at once.

    <root>/<name@digest12>/manifest.json      its time of change: when the version was last asked for
    <root>/<name@digest12>/1/…                the PEFT folder, read-only; what engines are given
    <root>/<name@digest12>/2/…                another copy, made because the first was damaged
    <root>/<name@digest12>/.incoming-…        a download; named by the bytes that it will take
    <root>/.locks/                            one for each version, and `.space` for the bookkeeping

A damaged copy is left as it is: an engine may have it mapped, and vLLM reads its adapters again when
it moves them back to the GPU. A new copy gets a new path, and both go together.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.digest import entry_of
from adapters.errors import StoreError
from adapters.file_lock import locked, try_lock
from adapters.node_copies import (
    INCOMING,
    MANIFEST_FILE,
    CachedVersion,
    is_of,
    measured,
    remove_tree,
    settle,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterable

    from adapters.manifest import Manifest
    from adapters.store import AdapterStore, Progress

TRASH = ".trash-"
LOCKS = ".locks"
SPACE_LOCK = ".space"
SPACE_LOCK_S = 30.0


class NodeCache:
    """Versions in a folder of this node."""

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        spare_bytes: int = 256 * 1024 * 1024,
        idle_s: float = 600.0,
        wait_s: float = 900.0,
    ) -> None:
        """Use a folder, made if missing.

        Args:
            root: The folder; every process of the node may use the same.
            max_bytes: How much may lie in it.
            spare_bytes: What its disk has to keep free.
            idle_s: A version asked for more recently is not evicted: its caller may not have told
                anybody yet.
            wait_s: How long to wait for another process that downloads the same version.
        """
        self.root = root.absolute()
        self._max_bytes = max_bytes
        self._spare_bytes = spare_bytes
        self._idle_s = idle_s
        self._wait_s = wait_s
        self._proven: dict[Path, tuple[tuple[int, int, int], ...]] = {}

    def fetch(
        self,
        store: AdapterStore,
        manifest: Manifest,
        *,
        in_use: Collection[str] = (),
        progress: Progress | None = None,
    ) -> Path:
        """Return a folder with the version's files, downloaded if they are not here or are damaged.

        Sizes are checked each time, contents when this process first sees them or their times change.

        Args:
            store: Where to get it from.
            manifest: Of the version.
            in_use: Versions, `name@digest12`, that are not to be evicted to make room.
            progress: Told of bytes done and bytes in all.

        Raises:
            StoreError: If the store or the disk fails, nothing can be evicted, or another process
                takes too long. Its subclasses: the store lacks the version, or has it damaged.
        """
        folder = self.root / manifest.version
        self._make_root()
        with locked(self._lock_path(manifest.version), self._wait_s):
            copies = self._copies(folder, manifest)
            if copies and self._is_whole(copies[-1], manifest):
                (folder / MANIFEST_FILE).touch()
            else:
                number = int(copies[-1].name) + 1 if copies else 1
                copies.append(self._download(store, manifest, number, in_use, progress))
        if progress is not None:
            progress(manifest.size_bytes, manifest.size_bytes)
        return copies[-1]

    def versions(self) -> list[CachedVersion]:
        """Return what lies here, least recently asked for first."""
        found = [measured(folder) for folder in self.root.glob("[!.]*@*")]
        return sorted((each for each in found if each), key=lambda cached: cached.used_s)

    def remove(self, version: str) -> bool:
        """Remove a version, and say whether it was there and not being fetched.

        Call it only once no engine can read the version again.
        """
        folder = self.root / version
        if not folder.is_dir():
            return False
        lock = try_lock(self._lock_path(version))
        if lock is None:
            return False
        try:
            trash = Path(tempfile.mkdtemp(prefix=TRASH, dir=self.root))
            with suppress(FileNotFoundError):
                folder.rename(trash / "version")
            remove_tree(trash)
        finally:
            lock.release(remove_file=True)
        return True

    def collect(self, named: Collection[str], grace_s: float, now_s: float) -> list[str]:
        """Return the versions that nobody names and nobody has asked for within `grace_s`."""
        return [
            cached.version
            for cached in self.versions()
            if cached.version not in named and now_s - cached.used_s > grace_s
        ]

    def _make_root(self) -> None:
        try:
            (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.root} cannot be made: {error.strerror or error}.") from error

    def _lock_path(self, version: str) -> Path:
        return self.root / LOCKS / version

    def _copies(self, folder: Path, manifest: Manifest) -> list[Path]:
        """Return the copies, oldest first; the lock is held, so no download is under way."""
        folder.mkdir(exist_ok=True)
        for path in folder.glob(f"{INCOMING}*"):
            remove_tree(path)
        copies = sorted(
            (p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
        )
        if copies and not is_of(folder, manifest.digest):
            raise StoreError(
                f"{folder} holds another version whose digest begins alike: publish this one anew."
            )
        return copies

    def _is_whole(self, copy: Path, manifest: Manifest) -> bool:
        try:
            stats = [(copy / entry.path).stat() for entry in manifest.files]
            if any(
                stat.st_size != entry.size_bytes
                for stat, entry in zip(stats, manifest.files, strict=True)
            ):
                return False
            seen = _identities(stats)
            if self._proven.get(copy) == seen:
                return True
            if any(entry_of(copy / entry.path) != entry for entry in manifest.files):
                return False
        except OSError:
            return False
        self._proven[copy] = seen
        return True

    def _download(
        self,
        store: AdapterStore,
        manifest: Manifest,
        number: int,
        in_use: Collection[str],
        progress: Progress | None,
    ) -> Path:
        folder = self.root / manifest.version
        incoming: Path | None = None
        try:
            with locked(self.root / LOCKS / SPACE_LOCK, SPACE_LOCK_S):
                self._make_room(manifest, in_use)
                # Its name is the reservation: others count these bytes from now on.
                name = f"{INCOMING}{manifest.size_bytes}-"
                incoming = Path(tempfile.mkdtemp(prefix=name, dir=folder))
            store.download(manifest, incoming, progress)
            copy = settle(incoming, folder / str(number), manifest)
            # Proven while it came.
            self._proven[copy] = _identities([(copy / e.path).stat() for e in manifest.files])
            return copy
        except OSError as error:
            raise StoreError(
                f"{folder} does not take the version: {error.strerror or error}.",
                "full" if error.errno in (28, 122) else "failed",
            ) from error
        finally:
            if incoming is not None and incoming.exists():
                remove_tree(incoming)
            # Empty after a first download that failed.
            with suppress(OSError):
                folder.rmdir()

    def _make_room(self, manifest: Manifest, in_use: Collection[str]) -> None:
        for trash in self.root.glob(f"{TRASH}*"):
            remove_tree(trash)
        versions = self.versions()
        used_bytes = sum(cached.size_bytes for cached in versions)
        idle_since_s = time.time() - self._idle_s
        evictable = [
            cached
            for cached in versions
            if cached.version not in in_use
            and cached.version != manifest.version
            and cached.used_s < idle_since_s
        ]
        while (missing_bytes := self._missing_bytes(manifest.size_bytes, used_bytes)) > 0:
            if not evictable:
                raise StoreError(
                    f"{self.root} has no room for {manifest.version}: {missing_bytes} bytes are "
                    f"missing of {self._max_bytes} allowed and {self._spare_bytes} to keep free, and "
                    "every other version there is in use.",
                    "full",
                )
            oldest = evictable.pop(0)
            if self.remove(oldest.version):
                used_bytes -= oldest.size_bytes

    def _missing_bytes(self, needed_bytes: int, used_bytes: int) -> int:
        over_bytes = used_bytes + needed_bytes - self._max_bytes
        free_bytes = shutil.disk_usage(self.root).free
        return max(over_bytes, needed_bytes + self._spare_bytes - free_bytes)


def _identities(stats: Iterable[os.stat_result]) -> tuple[tuple[int, int, int], ...]:
    """Return what changes whenever somebody writes to one of the files."""
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)
