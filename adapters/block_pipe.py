"""Carries blocks from a writer to a reader in another thread, a few at a time.

Owns the bound and the deadlines between them: an HTTP handler writes what comes in, `intake.py` reads
in a thread of its own. Never copies a block. An abort by either side is an error for the other.
"""

from __future__ import annotations

import time
from collections import deque
from threading import Condition
from typing import TYPE_CHECKING

from adapters.errors import UploadRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_BLOCKS = 8


class PipeClosed(Exception):
    """The other side has gone, or did nothing within the deadline."""


class BlockPipe:
    """A bounded pipe of blocks; one writer, one reader, both by thread."""

    def __init__(self, deadline_s: float = 60.0) -> None:
        """Open it.

        Args:
            deadline_s: How long either side waits for the other, for each block.
        """
        self._deadline_s = deadline_s
        self._blocks: deque[bytes] = deque()
        self._has_ended = False
        self._broken_by: BaseException | None = None
        self._changed = Condition()

    def write(self, block: bytes) -> None:
        """Hand a block over; waits while the reader is behind.

        Raises:
            PipeClosed: If the reader has gone or does not read.
        """
        with self._changed:
            self._wait(lambda: len(self._blocks) < MAX_BLOCKS, "nobody reads the upload")
            self._blocks.append(block)
            self._changed.notify_all()

    def close(self) -> None:
        """Say that everything was written."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Break it from either side, whoever waits wakes at once; idempotent."""
        with self._changed:
            self._broken_by = self._broken_by or PipeClosed("the upload was broken off")
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        """Yield the blocks until `close`.

        Raises:
            UploadRefused: If the writer aborted or went quiet.
        """
        while True:
            with self._changed:
                try:
                    self._wait(lambda: self._blocks or self._has_ended, "the upload stood still")
                except PipeClosed as error:
                    raise UploadRefused(f"{error}: send it again.") from error
                if not self._blocks:
                    return
                block = self._blocks.popleft()
                self._changed.notify_all()
            yield block

    def _wait(self, is_ready: Callable[[], object], fault: str) -> None:
        end_s = time.monotonic() + self._deadline_s
        while self._broken_by is None and not is_ready():
            if not self._changed.wait(end_s - time.monotonic()) and time.monotonic() >= end_s:
                self._broken_by = PipeClosed(fault)
                self._changed.notify_all()
        if self._broken_by is not None:
            raise PipeClosed(str(self._broken_by)) from self._broken_by
