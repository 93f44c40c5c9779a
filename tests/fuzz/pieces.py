"""How an input is cut: the same input always in the same way."""

from __future__ import annotations

import random
import re
import zlib

_MAX_CUTS = 12


def cut(data: bytes) -> list[bytes]:
    """Cuts `data` at places that depend on its bytes; short inputs often byte by byte."""
    places = random.Random(zlib.crc32(data))  # noqa: S311
    if len(data) < 2:
        return [data]
    if len(data) <= 64 and places.random() < 0.3:
        return [data[at : at + 1] for at in range(len(data))]
    ends = sorted({places.randrange(1, len(data)) for _ in range(places.randint(1, _MAX_CUTS))})
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


def at_event_ends(data: bytes) -> list[bytes]:
    """Cuts where a block looks as if it ended with an event and its chunk."""
    return [block for block in re.split(rb"(?<=\n\n\r\n)", data) if block]
