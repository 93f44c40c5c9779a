"""The header of a safetensors file: names, types, shapes and offsets, checked before anybody trusts them.

Owns the reading of it, by the format's rules (safetensors README: 8 bytes of little-endian length, JSON, data;
offsets without holes or overlaps). Never reads tensor bytes. Used by the linter, the intake and the tensor scan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from adapters.errors import InvalidAdapter
from adapters.strict_json import parse_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# The format allows 100 MB; an adapter of 100,000 tensors needs 15.
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_DIMENSIONS = 8
MAX_NAME_CHARS = 1000
_LENGTH_BYTES = 8
# Bits an element, of the types of safetensors 0.8.
DTYPE_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class TensorEntry(NamedTuple):
    """One tensor of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the data section."""
    end: int
    """One past its last byte."""

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsHeader:
    """What the header of one file says."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_at: int
    """Byte of the file at which the data section starts."""
    size_bytes: int
    """Of the whole file."""


def read_header(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.
        max_header_bytes: A longer header is refused before it is read.

    Raises:
        InvalidAdapter: If the file is missing, truncated or breaks the format in any way.
    """
    raw, size_bytes = _read_raw(path, max_header_bytes)
    fields = parse_object(raw, f"The header of {path.name}")
    metadata = _metadata(fields.pop("__metadata__", {}), path.name)
    tensors = {name: _entry(name, entry, path.name) for name, entry in fields.items()}
    data_at = _LENGTH_BYTES + len(raw)
    _check_layout(tensors, size_bytes - data_at, path.name)
    return SafetensorsHeader(tensors, metadata, data_at, size_bytes)


def _read_raw(path: Path, max_header_bytes: int) -> tuple[bytes, int]:
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size_bytes < _LENGTH_BYTES or length_bytes > size_bytes - _LENGTH_BYTES:
                raise InvalidAdapter(f"{path.name} is truncated or is no safetensors file.")
            if length_bytes > max_header_bytes:
                raise InvalidAdapter(
                    f"{path.name} has a header of {length_bytes} bytes; "
                    f"{max_header_bytes} are allowed."
                )
            raw = file.read(length_bytes)
    except OSError as error:
        raise InvalidAdapter(f"{path.name} cannot be read: {error.strerror or error}.") from error
    if len(raw) != length_bytes:
        raise InvalidAdapter(f"{path.name} is truncated.")
    return raw, size_bytes


def _metadata(given: Any, file: str) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise InvalidAdapter(f"__metadata__ of {file} has to map names to strings.")
    return given


def _entry(name: str, given: Any, file: str) -> TensorEntry:
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidAdapter(
            f"Tensor '{name[:200]}' of {file} needs dtype, shape and data_offsets, no more."
        )
    if len(name) > MAX_NAME_CHARS:
        raise InvalidAdapter(f"A tensor's name in {file} exceeds {MAX_NAME_CHARS} characters.")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InvalidAdapter(f"Tensor '{name[:200]}' of {file} has an unknown dtype.")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise InvalidAdapter(f"Tensor '{name[:200]}' of {file} has an impossible shape.")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidAdapter(f"Tensor '{name[:200]}' of {file} has impossible offsets.")
    entry = TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])
    if entry.num_elements * DTYPE_BITS[dtype] != 8 * (entry.end - entry.begin):
        raise InvalidAdapter(f"Tensor '{name[:200]}' of {file} is not as long as its shape says.")
    return entry


def _is_sizes(given: Any) -> bool:
    # `bool` is an `int` to Python, not to the format. 2**53: what JSON numbers carry exactly.
    return isinstance(given, list) and all(type(n) is int and 0 <= n < 2**53 for n in given)


def _check_layout(tensors: Mapping[str, TensorEntry], data_bytes: int, file: str) -> None:
    at = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            fault = "overlaps another" if entry.begin < at else "leaves a hole before it"
            raise InvalidAdapter(f"Tensor '{name[:200]}' of {file} {fault}.")
        at = entry.end
    if at != data_bytes:
        raise InvalidAdapter(
            f"{file} holds {data_bytes} bytes of tensors where its header says {at}: "
            "it is truncated or has a tail."
        )
