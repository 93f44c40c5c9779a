"""Tells the control plane which versions are waited for, so that it loads them; says when it cannot.

At most one question a second for each version, whoever asks. Never waits for the load itself: that
shows in a later snapshot. Called by `cold_start.py`.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from serving.fleet.http_client import post_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import ControlPlane

log = logging.getLogger(__name__)

PATH = "/internal/v1/demand"
_INTERVAL_S = 1.0
_TIMEOUT_S = 2.0
_RETRY_AFTER_S = 0.5
"""One that is just being restarted answers again by then, or the request fails fast."""
_TRANSIENT = (408, 429)
_MAX_REMEMBERED = 4096


class LoadRequests:
    """What one worker has asked for."""

    def __init__(
        self, control: ControlPlane, tasks: asyncio.TaskGroup, on_failed: Callable[[str], None]
    ) -> None:
        """Asks nothing yet.

        Args:
            control: The control plane.
            tasks: Owns the questions.
            on_failed: Called with a version that it cannot be asked to load, or refuses to.
        """
        self._control = control
        self._tasks = tasks
        self._on_failed = on_failed
        self._asked_at: dict[str, float] = {}

    def ask(self, version: str) -> None:
        """A request waits for a version."""
        now = monotonic()
        if now - self._asked_at.get(version, float("-inf")) < _INTERVAL_S:
            return
        if len(self._asked_at) >= _MAX_REMEMBERED:
            self._asked_at.clear()
        self._asked_at[version] = now
        self._tasks.create_task(self._post(version))

    async def _post(self, version: str) -> None:
        if await self._is_taken(version):
            return
        self._asked_at.pop(version, None)
        self._on_failed(version)

    async def _is_taken(self, version: str) -> bool:
        status = await self._status(version)
        if status is None or status in _TRANSIENT or status >= 500:
            await asyncio.sleep(_RETRY_AFTER_S)
            status = await self._status(version)
        is_taken = status is not None and status < 300
        if not is_taken:
            log.warning("load cannot be asked for", extra={"version": version, "status": status})
        return is_taken

    async def _status(self, version: str) -> int | None:
        control = self._control
        try:
            got = await post_json(
                control.host,
                control.port,
                PATH,
                msgspec.json.encode({"version": version}),
                timeout_s=_TIMEOUT_S,
                api_key=control.token.get_secret_value(),
            )
        except (OSError, UnicodeError):
            return None
        return got.status
