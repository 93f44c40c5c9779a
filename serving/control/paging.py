"""Pages of long lists, by the key of the last row: stable while rows come and go.

Owns the cursor's form. Never queries.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, TypeVar

from serving.control.errors import InvalidRequest
from serving.control.shapes.common import Page

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Row = TypeVar("Row")
Item = TypeVar("Item")
Key = TypeVar("Key", str, int)


def page_of(
    rows: Sequence[Row], limit: int, answer: Callable[[Row], Item], key: Callable[[Row], str | int]
) -> Page[Item]:
    """Return a page, of one row more than it may hold if there is a next one."""
    shown = rows[:limit]
    cursor = _encode(key(shown[-1])) if len(rows) > limit else None
    return Page(data=[answer(row) for row in shown], next_cursor=cursor)


def decode_cursor(cursor: str, kind: type[Key]) -> Key:
    """Return the key of the last row of the page before.

    Raises:
        InvalidRequest: If the cursor is not one of ours.
    """
    try:
        key: Key | None = json.loads(base64.urlsafe_b64decode(cursor.encode()))
    except (binascii.Error, ValueError):
        key = None
    # Not isinstance: True is an int too.
    if type(key) is not kind or not _is_in_bounds(key):
        raise InvalidRequest(
            "The cursor is not one that this list gave: leave it out to begin again.",
            param="cursor",
            code="invalid_cursor",
        )
    return key


def _is_in_bounds(key: object) -> bool:
    """Keys are 64-bit integers, or text without a null: PostgreSQL takes no other."""
    if isinstance(key, int):
        return 0 <= key < 2**63
    return "\0" not in str(key)


def _encode(key: str | int) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()
