"""Inference ids: time-ordered and not guessable, since feedback is accepted for whoever knows one."""

from __future__ import annotations

import os
from time import time_ns

_RANDOM_BYTES = 10
_POOL_BYTES = _RANDOM_BYTES * 512
_NS_PER_MS = 1_000_000
# UUIDv7 (RFC 9562, section 5.7): 48 bits of milliseconds, then 80 bits of which six are fixed.
_FIXED_BITS = 0x7 << 76 | 0b10 << 62
_RANDOM_BITS = (1 << 80) - 1 ^ (0xF << 76) ^ (0b11 << 62)


class InferenceIds:
    """Makes UUIDv7 values as 32 hexadecimal digits.

    Random bytes are drawn from the kernel in blocks, so that an id costs no system call.
    """

    __slots__ = ("_at", "_pool")

    def __init__(self) -> None:
        self._pool = b""
        self._at = 0

    def next(self) -> bytes:
        """One new id, 32 lower-case hexadecimal digits."""
        at = self._at
        if at >= len(self._pool):
            self._pool = os.urandom(_POOL_BYTES)
            at = 0
        self._at = end = at + _RANDOM_BYTES
        drawn = int.from_bytes(self._pool[at:end], "big") & _RANDOM_BITS
        return b"%032x" % ((time_ns() // _NS_PER_MS) << 80 | drawn | _FIXED_BITS)
