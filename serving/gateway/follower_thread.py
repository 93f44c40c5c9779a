"""The follower of a gateway with several workers: in the parent process, on a thread of its own.

The parent's loop waits for its workers' pipes and signals; this waits for the control plane. Between them
one snapshot at a time: taken by the parent, given to all workers, and only then said to be in effect.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from serving.gateway.adapter_metrics import open_tables
from serving.gateway.control_follower import ControlFollower

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from serving.config import GatewayConfig
    from serving.gateway.control_follower import Received

log = logging.getLogger(__name__)

_APPLIED_S = 2.0
"""For all workers to go by a snapshot; one that is stuck is ended by the parent meanwhile."""
_JOIN_S = 5.0


class FollowerThread:
    """Use between `start` and `stop`, all from the parent's main thread."""

    def __init__(self, config: GatewayConfig, metrics_dir: Path, waker: socket.socket) -> None:
        """Starts nothing yet.

        Args:
            config: Of a gateway with a control plane.
            metrics_dir: Where the workers' tables are.
            waker: Non-blocking; gets a byte when there is something to `take`.
        """
        self._follower = ControlFollower(
            config, self._hand_on, open_tables(metrics_dir, config.workers)
        )
        self._waker = waker
        self._newest: bytes | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_answered = threading.Event()
        self._applied = asyncio.Event()
        self._stop = asyncio.Event()
        # Never keeps the process alive: it holds nothing that would have to be saved.
        self._thread = threading.Thread(target=self._run, name="control-follower", daemon=True)

    def start(self, wait_s: float = 2.5) -> bytes | None:
        """Begins to follow.

        Args:
            wait_s: How long to wait for a first answer.

        Returns:
            The snapshot to start the workers with: the control plane's, else that on disk.
        """
        stored = self._follower.load()
        self._thread.start()
        self._has_answered.wait(wait_s)
        return self.take() or (None if stored is None else stored.body)

    def take(self) -> bytes | None:
        """A snapshot that came since the last call."""
        newest, self._newest = self._newest, None
        return newest

    def applied(self) -> None:
        """All workers go by what was taken last."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has just closed
                self._loop.call_soon_threadsafe(self._applied.set)

    def stop(self) -> None:
        """Ends it."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._follow())
        except Exception:
            log.exception("the control plane is no longer followed")
            raise
        finally:
            self._has_answered.set()

    async def _follow(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(self._follower.run())
            announcing = tasks.create_task(self._announce())
            await self._stop.wait()
            following.cancel()
            announcing.cancel()

    async def _announce(self) -> None:
        await self._follower.first_answer()
        self._has_answered.set()

    async def _hand_on(self, received: Received) -> None:
        self._applied.clear()
        self._newest = received.body
        # The first one may be taken by `start`, before there is any worker to go by it.
        self._has_answered.set()
        with suppress(BlockingIOError):  # it is full of bytes: the parent wakes anyway
            self._waker.send(b"\0")
        try:
            async with asyncio.timeout(_APPLIED_S):
                await self._applied.wait()
        except TimeoutError:
            log.warning("snapshot is not in effect in all workers yet")
