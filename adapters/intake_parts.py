"""The files of an adapter, as they lie in a folder of this machine or in an object store.

Owns how they are opened: nothing that is not a regular file is read. Never judges names or contents.
Called by `intake.py`.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from adapters.errors import UploadRefused
from adapters.kept_files import shown
from adapters.locations import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from adapters.locations import Location

    Part = tuple[str, Iterable[bytes]]
    """A file's name as it was sent, and its content."""


def folder_parts(folder: Path, follow_links: bool) -> Iterator[Part]:
    """Yield the files of a folder, sorted by name; folders in it are not looked at.

    Args:
        folder: The folder.
        follow_links: Whether files may be symbolic links.

    Raises:
        UploadRefused: If it is no folder, or something in it is no file.
    """
    if not folder.is_dir():
        raise UploadRefused(
            f"{shown(folder.name)} is not a folder: give the folder that PEFT saved."
        )
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.is_symlink():
            yield path.name, _file_blocks(path, follow_links)


def _file_blocks(path: Path, follow_links: bool) -> Iterator[bytes]:
    # A pipe would wait for a writer, a link may point anywhere: both are found out while opening.
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UploadRefused(f"{shown(path.name)} is not a regular file.")
            while block := os.read(descriptor, BLOCK_BYTES):
                yield block
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UploadRefused(
                f"{shown(path.name)} is a symbolic link: give a folder with the files themselves."
            ) from error
        raise UploadRefused(
            f"{shown(path.name)} cannot be read: {error.strerror or error}."
        ) from error


def object_parts(location: Location, prefix: str) -> Iterator[Part]:
    """Yield the objects right under a prefix, sorted by name.

    Raises:
        UploadRefused: If there are none.
        StoreError: If the location fails.
    """
    found = sorted(found.path for found in location.objects(prefix))
    if not found:
        raise UploadRefused(f"there is nothing under {location.url}/{prefix}.", 422)
    for path in found:
        name = path.removeprefix(prefix).lstrip("/")
        if "/" not in name:
            yield name, location.read(path)
