"""Looks at the numbers of an adapter: NaN and infinity, and matrices of zeros.

Owns the reading of tensor bytes, mapped and a piece at a time. Never converts: the bits of a float say both. Called by
the linter where it was asked for. numpy is of the extra `control`, so it is imported when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapters.safetensors_header import SafetensorsHeader, TensorEntry

PIECE_ELEMENTS = 4 * 1024 * 1024
# Of IEEE 754 binary32 and binary16, and of bfloat16: the type of the bits, the exponent's, all but the sign's.
_BITS = {
    "F32": ("<u4", 0x7F800000, 0x7FFFFFFF),
    "F16": ("<u2", 0x7C00, 0x7FFF),
    "BF16": ("<u2", 0x7F80, 0x7FFF),
}


class TensorValues(NamedTuple):
    """What the numbers of one tensor are."""

    is_finite: bool
    is_zero: bool


def scan_values(path: Path, header: SafetensorsHeader) -> Mapping[str, TensorValues]:
    """Look at every tensor of type F32, F16 or BF16.

    Args:
        path: The safetensors file.
        header: Its header, as `read_header` gave it.

    Returns:
        What each is, by name; others are left out.
    """
    return {
        name: _scan(path, header.data_at, entry)
        for name, entry in header.tensors.items()
        if entry.dtype in _BITS
    }


def _scan(path: Path, data_at: int, entry: TensorEntry) -> TensorValues:
    import numpy as np

    if entry.num_elements == 0:
        return TensorValues(is_finite=True, is_zero=True)
    kind, exponent, magnitude = _BITS[entry.dtype]
    bits = np.memmap(
        path, dtype=kind, mode="r", offset=data_at + entry.begin, shape=(entry.num_elements,)
    )
    is_zero = True
    for at in range(0, entry.num_elements, PIECE_ELEMENTS):
        piece = bits[at : at + PIECE_ELEMENTS]
        # All ones in the exponent: infinity or NaN, in each of these types.
        if bool(((piece & exponent) == exponent).any()):
            return TensorValues(is_finite=False, is_zero=False)
        is_zero = is_zero and not bool((piece & magnitude).any())
    return TensorValues(is_finite=True, is_zero=is_zero)
