"""From what somebody sends to a checked folder and its manifest.

Owns the staging folders: each upload has its own, and it goes with any failure and with its `Staged`.
Never stores, never judges whether an engine can serve it (`compat.py` does). Called by the control
plane and by the command line, by thread.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import ValidationError

from adapters.archive import members
from adapters.compat import lint
from adapters.digest import digest_of
from adapters.errors import InvalidAdapter, StoreError, StoreReason, UploadRefused
from adapters.intake_parts import folder_parts, object_parts
from adapters.kept_files import REQUIRED, WEIGHTS_FILE, shown, split_name, verdict_on
from adapters.limits import IntakeLimits
from adapters.manifest import BaseReference, FileEntry, Frozen, Manifest, Signature, Source
from adapters.version import adapter_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from adapters.intake_parts import Part
    from adapters.locations import Location

STAGING_PREFIX = "upload-"


class Claim(Frozen):
    """What the sender says of an adapter; the files say the rest."""

    adapter: str
    base: BaseReference
    source: Source
    parent: str | None = None
    signatures: tuple[Signature, ...] = ()


@dataclass(frozen=True, eq=False)
class Staged:
    """A checked adapter, in a folder that is removed with this object at the latest."""

    folder: Path
    manifest: Manifest

    def __post_init__(self) -> None:
        # A thread's result that nobody takes, because its caller was cancelled, takes the folder along.
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder; idempotent."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class Intake:
    """Takes adapters into staging folders under one root; safe to use by several threads."""

    def __init__(self, staging: Path, limits: IntakeLimits | None = None) -> None:
        """Use a root folder, made if missing; nobody else writes there.

        Args:
            staging: The root.
            limits: Of each adapter.
        """
        self._staging = staging
        self._limits = limits or IntakeLimits()

    def from_archive(self, blocks: Iterable[bytes], claim: Claim) -> Staged:
        """Take a tar or tar.gz, its files at the root or in one folder.

        Args:
            blocks: Its bytes as they come.
            claim: What the sender says.

        Raises:
            UploadRefused: If it is no archive of an adapter, is hostile, or too large.
            InvalidName: If the adapter's name breaks its grammar.
            StoreError: If the disk does not take it.
        """
        return self._staged(members(blocks, self._limits), claim)

    def from_parts(self, parts: Iterable[Part], claim: Claim) -> Staged:
        """Take files with their names, such as those of a multipart form.

        Raises:
            UploadRefused: If they are no adapter, hostile, or too large.
            InvalidName: If the adapter's name breaks its grammar.
            StoreError: If the disk does not take them.
        """
        return self._staged(parts, claim)

    def from_folder(self, folder: Path, claim: Claim, *, follow_links: bool = False) -> Staged:
        """Take the files of a folder on this machine; folders in it (checkpoints, logs) are not looked at.

        Args:
            folder: As PEFT saves it.
            claim: What the sender says.
            follow_links: Whether files may be symbolic links, as in a model hub's cache. Not for a
                path that somebody else named: a link can point at any file of this process.

        Raises:
            UploadRefused: If it is no adapter, or has a link or anything else that is no file.
            InvalidName: If the adapter's name breaks its grammar.
            StoreError: If the disk does not take it.
        """
        return self._staged(folder_parts(folder, follow_links), claim)

    def from_location(self, location: Location, prefix: str, claim: Claim) -> Staged:
        """Take the objects right under a prefix of an object store.

        Raises:
            UploadRefused: If they are no adapter, or too large.
            InvalidName: If the adapter's name breaks its grammar.
            StoreError: If the location or the disk fails.
        """
        return self._staged(object_parts(location, prefix.strip("/")), claim)

    def remove_leftovers(self, older_than_s: float, now_s: float) -> int:
        """Remove the folders of uploads whose process was killed, and return how many.

        Args:
            older_than_s: Younger ones may still be coming.
            now_s: Seconds since 1970.
        """
        num_removed = 0
        for folder in self._staging.glob(f"{STAGING_PREFIX}*"):
            if now_s - folder.stat().st_mtime > older_than_s:
                shutil.rmtree(folder, ignore_errors=True)
                num_removed += 1
        return num_removed

    def _staged(self, parts: Iterable[Part], claim: Claim) -> Staged:
        adapter_name(claim.adapter)
        with _disk_errors(self._staging):
            self._staging.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=self._staging))
        try:
            files = _Receiver(folder, self._limits).receive(parts)
            return Staged(folder, _manifest(folder, files, claim))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


class _Receiver:
    """Writes the parts of one upload into its folder."""

    def __init__(self, folder: Path, limits: IntakeLimits) -> None:
        self._folder = folder
        self._limits = limits
        self._left_bytes = limits.max_total_bytes
        self._seen: dict[str, str] = {}
        self._folders: set[str] = set()

    def receive(self, parts: Iterable[Part]) -> list[FileEntry]:
        files = []
        for path, blocks in parts:
            name = self._admit(path)
            if verdict_on(name) == "kept":
                files.append(self._write(name, blocks))
        missing = [name for name in REQUIRED if name not in self._seen.values()]
        if missing:
            raise UploadRefused(
                f"the upload has no {' and no '.join(missing)}: send the folder that PEFT's "
                "save_pretrained wrote.",
                422,
            )
        return files

    def _admit(self, path: str) -> str:
        folder, name = split_name(path)
        other = self._seen.setdefault(name.casefold(), name)
        if len(self._seen) + len(self._folders) > self._limits.max_members:
            raise UploadRefused(f"the upload has more than {self._limits.max_members} files.", 413)
        if other is not name:
            raise UploadRefused(
                f"{shown(name)} comes twice, or with other capitals: send each file once."
            )
        self._folders.add(folder)
        if len(self._folders) > 1:
            raise UploadRefused(
                f"{shown(path)} lies in another folder than the rest: send one adapter at a time."
            )
        return name

    def _write(self, name: str, blocks: Iterable[bytes]) -> FileEntry:
        is_weights = name == WEIGHTS_FILE
        max_bytes = self._limits.max_weights_bytes if is_weights else self._limits.max_text_bytes
        sha256, num_bytes = hashlib.sha256(), 0
        with _disk_errors(self._folder), (self._folder / name).open("xb") as file:
            for block in blocks:
                num_bytes += len(block)
                self._left_bytes -= len(block)
                if num_bytes > max_bytes:
                    raise UploadRefused(f"{name} is larger than {max_bytes} bytes.", 413)
                if self._left_bytes < 0:
                    raise UploadRefused(
                        f"the adapter is larger than {self._limits.max_total_bytes} bytes.", 413
                    )
                sha256.update(block)
                file.write(block)
        return FileEntry(path=name, size_bytes=num_bytes, sha256_hex=sha256.hexdigest())


def _manifest(folder: Path, files: list[FileEntry], claim: Claim) -> Manifest:
    try:
        facts = lint(folder, None, ())
        return Manifest(
            adapter=claim.adapter,
            digest=digest_of(files),
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            base=claim.base,
            size_bytes=sum(entry.size_bytes for entry in files),
            parent=claim.parent,
            source=claim.source,
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            signatures=claim.signatures,
            rank=facts.rank,
            alpha=facts.alpha,
            target_modules=facts.target_modules,
            dtype=facts.dtype,
            num_parameters=facts.num_parameters,
        )
    except InvalidAdapter as error:
        raise UploadRefused(str(error), 422) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UploadRefused(
            f"the adapter's {first['loc'][0]} cannot be: {first['msg'].lower()}.", 422
        ) from error


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason: StoreReason = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "failed"
        raise StoreError(
            f"the staging folder {folder} does not take the upload: {error.strerror or error}.",
            reason,
        ) from error
