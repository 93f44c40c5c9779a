"""The adapter store: files of versions and their manifests in one location.

Owns the layout and the order of its writes: data first, manifest last, so that what can be listed can
be read. Never decides what is deleted (`garbage.py`), never keeps a copy (`node_cache.py`). Called by
the control plane and by every node, by thread.

    versions/<digest>/<file>                  a PEFT folder as it is; shared by all names it has
    manifests/<adapter>/<digest>.json         what makes it a version of that adapter
    unnamed/…                                 the garbage collector's marks
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from adapters.digest import BLOCK_BYTES, digest_of
from adapters.errors import CorruptObject, InvalidAdapter, NotInStore, StoreError
from adapters.locations import sync
from adapters.sealed_manifest import sealed, unsealed
from adapters.version import version_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from adapters.locations import Location
    from adapters.manifest import FileEntry, Manifest
    from adapters.version import VersionName

    Progress = Callable[[int, int], None]
    """Called with bytes done and bytes in all; an exception out of it breaks the transfer off."""

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
VERSIONS = "versions"
MANIFESTS = "manifests"
UNNAMED = "unnamed"


class StoredVersion(NamedTuple):
    """One manifest that the store lists."""

    adapter: str
    digest: str

    @property
    def version(self) -> str:
        """`name@digest12`."""
        return f"{self.adapter}@{self.digest[:12]}"


class AdapterStore:
    """Versions in a location; safe to use by several threads and processes."""

    def __init__(self, location: Location) -> None:
        """Use a location; several stores may use the same."""
        self.location = location

    def push(self, folder: Path, manifest: Manifest, progress: Progress | None = None) -> Manifest:
        """Store a version; the same one again is no error and writes damaged files anew.

        Args:
            folder: Holds the files of the manifest.
            manifest: What to store.
            progress: Told of each block.

        Returns:
            The manifest that is in the store: that of whoever was first.

        Raises:
            InvalidAdapter: If the folder's files are not those of the manifest.
            InvalidName: If the adapter's name breaks its grammar.
            StoreError: If the location cannot take them; then the version is not listed.
        """
        version_name(manifest.adapter, manifest.digest)
        if digest_of(manifest.files) != manifest.digest:
            raise InvalidAdapter(f"the manifest of {manifest.version} names other files.")
        self._unmark(manifest)
        counter = _Counter(manifest.size_bytes, progress)
        for entry in manifest.files:
            self._put_file(folder, manifest, entry, counter)
        stored = self._put_manifest(manifest)
        # A collector that had decided before we took its marks away may have deleted meanwhile.
        self._unmark(manifest)
        for entry in manifest.files:
            if self.location.size_bytes(_file_path(manifest.digest, entry)) != entry.size_bytes:
                self._put_file(folder, manifest, entry, _Counter(0, None))
        return stored

    def _put_file(
        self, folder: Path, manifest: Manifest, entry: FileEntry, counter: _Counter
    ) -> None:
        blocks = counter.counted(_checked_file(folder / entry.path, entry))
        self.location.put(_file_path(manifest.digest, entry), blocks, entry.size_bytes)

    def _put_manifest(self, manifest: Manifest) -> Manifest:
        path = manifest_path(manifest.adapter, manifest.digest)
        content = sealed(manifest)
        if not self.location.create(path, content):
            with suppress(CorruptObject, NotInStore):
                return self.manifest(manifest.adapter, manifest.digest)
            self.location.put(path, [content], len(content))
        return manifest

    def _unmark(self, manifest: Manifest) -> None:
        for mark in marks_of(manifest.adapter, manifest.digest):
            self.location.delete(mark)

    def manifest(self, adapter: str, digest: str) -> Manifest:
        """Read the manifest of a version.

        Raises:
            NotInStore: If there is none.
            CorruptObject: If it is damaged.
        """
        path = manifest_path(adapter, digest)
        content = b""
        for block in self.location.read(path):
            content += block
            if len(content) > MAX_MANIFEST_BYTES:
                raise CorruptObject(f"{path} is larger than a manifest can be.")
        manifest = unsealed(content, path)
        if (manifest.adapter, manifest.digest) != (adapter, digest):
            raise CorruptObject(f"{path} is the manifest of {manifest.version}.")
        return manifest

    def find(self, version: VersionName) -> Manifest:
        """Read the manifest of `name@digest12`.

        Raises:
            NotInStore: If there is none.
            CorruptObject: If it is damaged.
            StoreError: If two digests begin like that.
        """
        found = [
            stored.digest
            for stored in self.list(version.adapter)
            if stored.digest.startswith(version.short_digest)
        ]
        if not found:
            raise NotInStore(f"{version} is not in {self.location.url}.")
        if len(found) > 1:
            raise StoreError(f"{version} could be {' or '.join(found)}: give the whole digest.")
        return self.manifest(version.adapter, found[0])

    def list(self, adapter: str | None = None) -> Iterator[StoredVersion]:
        """Yield the versions of one adapter, or of all, in no order.

        Raises:
            StoreError: If the location does not say.
        """
        for found in self.location.objects(f"{MANIFESTS}/{adapter}" if adapter else MANIFESTS):
            parts = found.path.split("/")
            if len(parts) == 3 and parts[2].endswith(".json"):
                yield StoredVersion(parts[1], parts[2].removesuffix(".json"))

    def read_file(self, manifest: Manifest, entry: FileEntry) -> Iterator[bytes]:
        """Yield a file's blocks; what was yielded counts only once the last has come.

        Raises:
            NotInStore: If it is missing.
            CorruptObject: If it is damaged.
        """
        path = _file_path(manifest.digest, entry)
        sha256, num_bytes = hashlib.sha256(), 0
        for block in self.location.read(path):
            num_bytes += len(block)
            if num_bytes > entry.size_bytes:
                break
            sha256.update(block)
            yield block
        if num_bytes != entry.size_bytes or sha256.hexdigest() != entry.sha256_hex:
            raise CorruptObject(
                f"{path} in {self.location.url} is not what was pushed: push {manifest.version} again."
            )

    def download(self, manifest: Manifest, folder: Path, progress: Progress | None = None) -> None:
        """Write a version's files into a folder, checked and flushed to the disk.

        Args:
            manifest: Of the version.
            folder: Has to exist and be empty; what is in it after an error is to be thrown away.
            progress: Told of each block.

        Raises:
            NotInStore: If a file is missing.
            CorruptObject: If one is damaged.
            StoreError: If the location or the disk fails.
        """
        counter = _Counter(manifest.size_bytes, progress)
        for entry in manifest.files:
            blocks = counter.counted(self.read_file(manifest, entry))
            with (folder / entry.path).open("xb") as file:
                file.writelines(blocks)
            sync(folder / entry.path)
        sync(folder)

    def delete(self, adapter: str, digest: str) -> None:
        """Delete a version at once, its files too unless they have another name; idempotent.

        Raises:
            StoreError: If the location does not let us.
        """
        self.location.delete(manifest_path(adapter, digest))
        if not any(stored.digest == digest for stored in self.list()):
            self.delete_files(digest)

    def delete_files(self, digest: str) -> None:
        """Delete the files of a digest; for the garbage collector."""
        for found in list(self.location.objects(f"{VERSIONS}/{digest}")):
            self.location.delete(found.path)


class _Counter:
    """Tells how much of all files is done."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._done_bytes = 0

    def counted(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        for block in blocks:
            yield block
            self._done_bytes += len(block)
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)


def manifest_path(adapter: str, digest: str) -> str:
    """Return where a manifest lies."""
    return f"{MANIFESTS}/{adapter}/{digest}.json"


def marks_of(adapter: str, digest: str) -> tuple[str, str]:
    """Return where the collector's marks on a manifest and on its files lie."""
    return f"{UNNAMED}/{MANIFESTS}/{adapter}/{digest}", f"{UNNAMED}/{VERSIONS}/{digest}"


def _file_path(digest: str, entry: FileEntry) -> str:
    return f"{VERSIONS}/{digest}/{entry.path}"


def _checked_file(path: Path, entry: FileEntry) -> Iterator[bytes]:
    """Yield a local file's blocks; raises at the end, before the upload is complete, if it differs."""
    sha256, num_bytes = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
                num_bytes += len(block)
                if num_bytes > entry.size_bytes:
                    break
                yield block
    except OSError as error:
        raise InvalidAdapter(f"{path.name} cannot be read: {error.strerror or error}.") from error
    if num_bytes != entry.size_bytes or sha256.hexdigest() != entry.sha256_hex:
        raise InvalidAdapter(f"{path.name} is not the file that the manifest names.")
