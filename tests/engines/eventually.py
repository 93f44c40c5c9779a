"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 10.0
_POLL_S = 0.002


async def eventually(holds: Callable[[], bool], within_s: float = DEADLINE_S) -> None:
    """Returns once `holds()`; fails after `within_s` seconds."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not holds():
        assert asyncio.get_running_loop().time() < deadline, "it never came true"
        await asyncio.sleep(_POLL_S)
