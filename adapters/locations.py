"""Where objects lie: a local folder, S3, Google Cloud Storage or Azure, all through obstore.

Owns opening a location, its deadlines, and the translation of its errors into ours. Never knows what
an object means. Called by `store.py`, `garbage.py` and the intake of object URLs. obstore reads the
usual variables (AWS_…, GOOGLE_…, AZURE_…) for whatever the settings leave open.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr

from adapters.errors import NotInStore, StoreError
from adapters.location_errors import location_errors
from adapters.manifest import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

    from obstore.store import ObjectStore

BLOCK_BYTES = 1024 * 1024
# Below it one request; above it parts of this size, PART_UPLOADS of them at once: 32 MiB of memory.
PART_BYTES = 8 * 1024 * 1024
PART_UPLOADS = 4
MAX_RETRIES = 4
# obstore bounds a whole request, body and all; what stands still is caught by `idle_s` long before.
WHOLE_REQUEST_S = 6 * 3600
SCHEMES = frozenset({"file", "s3", "s3a", "gs", "az", "abfs", "abfss"})
# How obstore's local store names a file that it has not finished.
_PARTIAL = re.compile(r"#\d+$")


class LocationSettings(Frozen):
    """How to reach a location; what is None comes from obstore's variables."""

    endpoint: str | None = None
    """Of an S3 server that is not Amazon's, for example `http://minio:9000`."""
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: SecretStr | None = None
    connect_s: float = Field(default=5.0, gt=0)
    """To connect."""
    idle_s: float = Field(default=30.0, gt=0)
    """Without a byte of an answer."""
    retry_s: float = Field(default=60.0, gt=0)
    """After which a failed request is not tried again."""


class StoredObject(NamedTuple):
    """One object of a location."""

    path: str
    size_bytes: int
    modified_s: float
    """Seconds since 1970."""


class Location:
    """A place for objects, addressed by paths with `/`; safe to use by several threads."""

    def __init__(self, url: str, settings: LocationSettings | None = None) -> None:
        """Open it; nothing is sent yet, a local folder is made.

        Args:
            url: `file:///…` or a path, `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`,
                `az://CONTAINER/PREFIX`.
            settings: How to reach it.

        Raises:
            StoreError: If the URL or a setting cannot work.
        """
        scheme = urlsplit(url).scheme if "://" in url else ""
        if scheme and scheme not in SCHEMES:
            raise StoreError(f"'{scheme}://' is no store: use a folder, s3://, gs:// or az://.")
        self.folder: Path | None = None
        if scheme in {"", "file"}:
            path = Path(unquote(urlsplit(url).path)) if scheme else Path(url)
            self.folder = path.absolute()
        self.url = self.folder.as_uri() if self.folder else url.rstrip("/")
        with self._errors():
            self._store = self._open(settings or LocationSettings())

    def _open(self, settings: LocationSettings) -> ObjectStore:
        from obstore.store import LocalStore, from_url

        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return LocalStore(self.folder)
        client: Any = {
            "allow_http": bool(settings.endpoint and settings.endpoint.startswith("http://")),
            "connect_timeout": timedelta(seconds=settings.connect_s),
            "read_timeout": timedelta(seconds=settings.idle_s),
            "timeout": timedelta(seconds=WHOLE_REQUEST_S),
        }
        secret = settings.secret_access_key
        keys: Any = {
            "endpoint": settings.endpoint,
            "region": settings.region,
            "access_key_id": settings.access_key_id,
            "secret_access_key": secret.get_secret_value() if secret else None,
        }
        options: Any = {
            "config": {key: value for key, value in keys.items() if value is not None},
            "client_options": client,
            "retry_config": {
                "max_retries": MAX_RETRIES,
                "retry_timeout": timedelta(seconds=settings.retry_s),
            },
        }
        opened: ObjectStore = from_url(self.url, **options)
        return opened

    def put(self, path: str, blocks: Iterable[bytes], size_bytes: int) -> None:
        """Write an object; it appears whole or not at all, and replaces what was there.

        Args:
            path: Of the object.
            blocks: Its content; an exception out of it takes the upload back.
            size_bytes: Of the content; large ones go in parts.

        Raises:
            StoreError: If the location cannot take it.
        """
        source = _Source(blocks)
        try:
            with self._errors():
                self._put(path, source, size_bytes)
                self._settle(path)
        except StoreError:
            # An OSError of the source is not one of the location.
            if source.error is not None:
                raise source.error from None
            raise

    def _put(self, path: str, source: Iterable[bytes], size_bytes: int) -> None:
        import obstore

        if size_bytes <= PART_BYTES:
            obstore.put(self._store, path, b"".join(source), use_multipart=False)
            return
        obstore.put(
            self._store,
            path,
            iter(source),
            use_multipart=True,
            chunk_size=PART_BYTES,
            max_concurrency=PART_UPLOADS,
        )

    def create(self, path: str, content: bytes) -> bool:
        """Write a small object unless there is one, and say whether it was written.

        Raises:
            StoreError: If the location cannot take it.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._errors():
            try:
                obstore.put(self._store, path, content, mode="create")
            except AlreadyExistsError:
                return False
            self._settle(path)
        return True

    def read(self, path: str) -> Iterator[bytes]:
        """Yield an object's content in blocks of about 1 MiB.

        Raises:
            NotInStore: If there is none.
            StoreError: If it cannot be read.
        """
        import obstore

        with self._errors():
            yield from obstore.get(self._store, path).stream(min_chunk_size=BLOCK_BYTES)

    def size_bytes(self, path: str) -> int | None:
        """Return an object's size in bytes, None if there is no such object.

        Raises:
            StoreError: If the location does not say.
        """
        import obstore

        try:
            with self._errors():
                return int(obstore.head(self._store, path)["size"])
        except NotInStore:
            return None

    def objects(self, prefix: str) -> Iterator[StoredObject]:
        """Yield the objects under a folder, in no order.

        Raises:
            StoreError: If the location does not say.
        """
        import obstore

        with self._errors():
            for page in obstore.list(self._store, prefix):
                for found in page:
                    modified_s = found["last_modified"].timestamp()
                    yield StoredObject(found["path"], int(found["size"]), modified_s)

    def delete(self, path: str) -> None:
        """Delete an object if there is one.

        Raises:
            StoreError: If the location does not let us.
        """
        import obstore

        with suppress(NotInStore), self._errors():
            obstore.delete(self._store, path)
            if self.folder is not None:
                _remove_empty(self.folder, (self.folder / path).parent)

    def partial_uploads(self, before_s: float) -> list[Path]:
        """Return what uploads that were killed left in a local folder; nobody lists it as an object.

        Args:
            before_s: Seconds since 1970; what changed later may still be coming.
        """
        if self.folder is None:
            return []
        found = [path for path in self.folder.rglob("*#*") if _PARTIAL.search(path.name)]
        return [path for path in found if path.is_file() and path.stat().st_mtime < before_s]

    def _settle(self, path: str) -> None:
        # obstore does not flush a local file; the order "data, then manifest" has to outlive a
        # power cut.
        if self.folder is None:
            return
        at = self.folder / path
        for each in (at, *at.parents):
            sync(each)
            if each == self.folder:
                return

    def _errors(self) -> AbstractContextManager[None]:
        return location_errors(self.url)


class _Source:
    """Blocks that remember what went wrong while they were made."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = blocks
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._blocks
        except Exception as error:
            self.error = error
            raise


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty(root: Path, folder: Path) -> None:
    with suppress(OSError):
        while folder != root:
            folder.rmdir()
            folder = folder.parent
