"""Inference ids: time-ordered and not guessable, since feedback is accepted for whoever knows one."""

from __future__ import annotations

import os
import time

_RANDOM_BYTES = 10
_POOL_BYTES = _RANDOM_BYTES * 512


class InferenceIds:
    """Makes UUIDv7 values (RFC 9562, section 5.7) as 32 hexadecimal digits.

    Random bytes are drawn from the kernel in blocks, so that an id costs no system call.
    """

    __slots__ = ("_at", "_pool")

    def __init__(self) -> None:
        self._pool = b""
        self._at = 0

    def next(self) -> bytes:
        """One new id, 32 lower-case hexadecimal digits."""
        if self._at >= len(self._pool):
            self._pool = os.urandom(_POOL_BYTES)
            self._at = 0
        at = self._at
        self._at = at + _RANDOM_BYTES
        drawn = self._pool[at : at + _RANDOM_BYTES].hex()
        # 48 bits of milliseconds, version 7, 12 random bits, variant 10, 62 random bits.
        head = f"{time.time_ns() // 1_000_000:012x}7{drawn[:3]}"
        return f"{head}{_VARIANT[drawn[3]]}{drawn[4:19]}".encode()


_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
