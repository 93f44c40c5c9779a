"""Counters that all workers of a gateway can read and each worker writes alone.

One memory-mapped file a worker: a fixed header, the outstanding tokens by replica, and rows of
float64 columns, each under a text key. An increment is one store to memory, so that counting
costs nanoseconds on the hot path; any worker answers for all of them by adding up the files; and
a restarted worker goes on with its file, so that counters never go backwards.

Only `ledger.py` and `metrics.py` know what the numbers mean.

Correctness: a column has one writer, and an aligned 8-byte store is not torn on the platforms that
we run on (x86-64, AArch64), so a reader sees the value before or after an increment.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_REPLICAS = 1024
MAX_ROWS = 2048
_KEY_BYTES = 512
_F64 = 8
_HEADER_COLUMNS = 16
_ROWS_USED = 0
"""Header column: number of rows that are complete. Written after the row's key."""
_GENERATION = 1
"""Header column: grows when a row gets another key."""


class SharedTable:
    """The table of one worker, mapped into memory.

    Attributes:
        values: All float64 values; index with `base_of(...) + column`.
        overflows: Keys that found no free row and were counted under the overflow key.
    """

    def __init__(self, path: Path, num_columns: int, max_rows: int = MAX_ROWS) -> None:
        """Maps the table at `path`, creating it (sparse) where it does not exist.

        Args:
            path: Its file.
            num_columns: Of each row.
            max_rows: The last of them is the overflow row.

        Raises:
            OSError: If the file cannot be made or mapped.
        """
        self._num_columns = num_columns
        self._row_bytes = _KEY_BYTES + num_columns * _F64
        self._rows_at = (_HEADER_COLUMNS + MAX_REPLICAS) * _F64
        self._max_rows = max_rows
        size = self._rows_at + max_rows * self._row_bytes
        with path.open("a+b") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self.values: memoryview[float] = memoryview(self._map).cast("d")
        self.outstanding_tokens = self.values[_HEADER_COLUMNS : _HEADER_COLUMNS + MAX_REPLICAS]
        self.overflows = 0
        self._bases: dict[str, int] = {}
        self._generation = 0.0
        self._read_keys()

    def _read_keys(self) -> None:
        if self._generation != self.values[_GENERATION]:
            self._generation = self.values[_GENERATION]
            self._bases.clear()
        for row in range(len(self._bases), int(self.values[_ROWS_USED])):
            start = self._rows_at + row * self._row_bytes
            key = self._map[start : start + _KEY_BYTES].rstrip(b"\0").decode()
            self._bases[key] = (start + _KEY_BYTES) // _F64

    def base_of(self, key: str) -> int:
        """Index of a row's first column; the row is made at the first use of its key.

        A key that finds the table full, or is too long to store, counts under the last row, whose
        key is empty: the number of series stays bounded whatever clients send.
        """
        base = self._bases.get(key)
        return self._add_row(key) if base is None else base

    @property
    def is_full(self) -> bool:
        """Whether a new key would be counted under the overflow row."""
        return len(self._bases) >= self._max_rows - 1

    def reuse(self, old_key: str, new_key: str) -> None:
        """Gives a row that nobody counts under any more to another key, from zero.

        A reader that looks meanwhile may see the old key once more with the new counts.
        """
        base = self._bases.pop(old_key)
        start = base * _F64 - _KEY_BYTES
        self.values[base : base + self._num_columns] = memoryview(
            bytes(self._num_columns * _F64)
        ).cast("d")
        self._map[start : start + _KEY_BYTES] = new_key.encode().ljust(_KEY_BYTES, b"\0")
        self._bases[new_key] = base
        self._generation = self.values[_GENERATION] = self.values[_GENERATION] + 1

    def _add_row(self, key: str) -> int:
        row = len(self._bases)
        encoded = key.encode()
        if row >= self._max_rows - 1 or len(encoded) > _KEY_BYTES:
            self.overflows += 1
            if not key:
                raise ValueError("a shared table has no room for its overflow row")
            return self._bases.get("") or self._add_row_at("", len(self._bases))
        return self._add_row_at(key, row)

    def _add_row_at(self, key: str, row: int) -> int:
        start = self._rows_at + row * self._row_bytes
        encoded = key.encode()
        self._map[start : start + len(encoded)] = encoded
        self._bases[key] = (start + _KEY_BYTES) // _F64
        self.values[_ROWS_USED] = row + 1
        return self._bases[key]

    def rows(self) -> Iterator[tuple[str, memoryview[float]]]:
        """Every row's key and columns, those of other processes included."""
        self._read_keys()
        for key, base in list(self._bases.items()):
            yield key, self.values[base : base + self._num_columns]

    def close(self) -> None:
        """Unmaps the file; the counts stay in it."""
        self.outstanding_tokens.release()
        self.values.release()
        self._map.close()
