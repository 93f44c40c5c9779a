"""A lock across processes and threads: an exclusive flock on a file.

Owns taking it with a deadline and removing its file. The kernel frees it with the process that held it,
however that ends. Used by the node's cache.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from adapters.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POLL_S = 0.05


class FileLock:
    """A held lock."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Hold what `try_lock` got."""
        self._path = path
        self._descriptor = descriptor

    def release(self, *, remove_file: bool = False) -> None:
        """Give it up; the file is removed only while it is held, so that nobody locks a lost one."""
        if remove_file:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def try_lock(path: Path) -> FileLock | None:
    """Take the lock if it is free, and return None if it is not."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have removed the file: then this is the lock of no path.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return FileLock(path, descriptor)
    os.close(descriptor)
    return None


@contextmanager
def locked(path: Path, deadline_s: float) -> Iterator[None]:
    """Hold the lock for a block of code.

    Args:
        path: Of its file, made if missing.
        deadline_s: How long to wait for it.

    Raises:
        StoreError: If somebody else holds it for longer.
    """
    end_s = time.monotonic() + deadline_s
    while (lock := try_lock(path)) is None:
        if time.monotonic() > end_s:
            raise StoreError(f"another process has held {path} for {deadline_s:g} s: look at it.")
        time.sleep(POLL_S)
    try:
        yield
    finally:
        lock.release()
