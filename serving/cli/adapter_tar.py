"""An adapter's folder as a tar archive that is made while it is sent.

Owns: which files of a folder are sent, and the archive's bytes. Never: holds a file in memory, or judges
the content (the platform does). Used by `serving/cli/adapters.py`.
"""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

from serving.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

REQUIRED = ("adapter_config.json",)
READ_BYTES = 1 << 20
_END = b"\0" * (2 * tarfile.BLOCKSIZE)


class AdapterTar:
    """The archive of one folder; iterate over it to get its bytes.

    Attributes:
        size_bytes: Of the whole archive.
    """

    def __init__(self, folder: Path, on_sent: Callable[[int], None]) -> None:
        """Look at the folder.

        Args:
            folder: With `adapter_config.json` in it.
            on_sent: Called with the number of bytes of each block once it is taken.

        Raises:
            ConfigError: If it is not an adapter's folder.
        """
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give the folder that PEFT saved")
        for name in REQUIRED:
            if not (folder / name).is_file():
                raise ConfigError(f"{folder}: it has no {name}; give the folder that PEFT saved")
        # Hidden files and folders (checkpoints, logs) are no part of an adapter.
        self._files = sorted(
            path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
        )
        self._on_sent = on_sent
        self.size_bytes = len(_END) + sum(
            len(self._header(path)) + _padded(path.stat().st_size) for path in self._files
        )

    def _header(self, path: Path) -> bytes:
        entry = tarfile.TarInfo(path.name)
        entry.size = path.stat().st_size
        entry.mode = 0o644
        return entry.tobuf(format=tarfile.PAX_FORMAT)

    def __iter__(self) -> Iterator[bytes]:
        for path in self._files:
            header = self._header(path)
            yield self._sent(header)
            left = path.stat().st_size
            padding = _padded(left) - left
            with path.open("rb") as file:
                while left:
                    block = file.read(min(READ_BYTES, left))
                    if not block:
                        raise ConfigError(f"{path}: it became shorter while it was sent")
                    left -= len(block)
                    yield self._sent(block)
            yield self._sent(b"\0" * padding)
        yield self._sent(_END)

    def _sent(self, block: bytes) -> bytes:
        self._on_sent(len(block))
        return block


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
