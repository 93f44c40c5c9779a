"""The last snapshot of the control plane on disk: what a gateway starts from without it.

Owns the file's name and that it is always whole. Never reads its meaning. Called by
`control_follower.py`; writing blocks on the disk, so it is done beside the loop.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

NAME = "published.json"
MAX_BYTES = 256 * 1024 * 1024


def read(folder: Path) -> bytes | None:
    """The bytes that were written last, or None.

    Raises:
        OSError: If there is a file that cannot be read, or one that is too large to be ours.
    """
    path = folder / NAME
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return None
    if size_bytes > MAX_BYTES:
        raise OSError(f"{path} is larger than {MAX_BYTES} bytes")
    return path.read_bytes()


def write(folder: Path, content: bytes) -> None:
    """Puts new bytes in the place of the old ones; after a crash there are the ones or the others.

    Raises:
        OSError: If the disk does not take them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{NAME}.", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(folder / NAME)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    # The new name has to be on the disk too.
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
