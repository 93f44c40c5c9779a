"""Reads JSON that strangers wrote: a size limit, no duplicate keys, no NaN, one kind of error.

Never interprets what it read. Used by whatever reads a file of an adapter's folder.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn

from adapters.errors import InvalidAdapter

if TYPE_CHECKING:
    from pathlib import Path

MAX_JSON_BYTES = 1024 * 1024


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: UTF-8 text.
        what: How the error calls it.

    Raises:
        InvalidAdapter: If it is no JSON object, nests too deeply, repeats a key or holds NaN.
    """
    try:
        parsed = json.loads(
            raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    # A number of more digits than Python converts is a ValueError, deep nesting a RecursionError.
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise InvalidAdapter(f"{what} is not valid JSON: {reason}.") from error
    if not isinstance(parsed, dict):
        raise InvalidAdapter(f"{what} has to be a JSON object.")
    return parsed


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file of 1 MiB at most.

    Raises:
        InvalidAdapter: As `parse_object`, or if the file is missing, unreadable or too large.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InvalidAdapter(f"{path.name} cannot be read: {error.strerror or error}.") from error
    if len(raw) > MAX_JSON_BYTES:
        raise InvalidAdapter(f"{path.name} is larger than {MAX_JSON_BYTES} bytes.")
    return parse_object(raw, path.name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key '{repeated[:100]}' appears twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
