"""Follows the control plane: its snapshots come in by a long poll, traffic goes out.

One for a gateway, in the process that owns its port. Owns the connection's life, what counts as a
snapshot, and the copy on disk. Never routes by one: whoever made the follower hands it on. A snapshot
that makes no sense is refused, and the one before stays in effect.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from serving.fleet.http_client import get, post_json
from serving.fleet.learn import is_version
from serving.gateway import published_file
from serving.gateway.traffic_report import TrafficReport
from serving.routing.published import Published, decode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from serving.config import GatewayConfig
    from serving.gateway.shared_table import SharedTable

log = logging.getLogger(__name__)

SNAPSHOT_PATH = "/internal/v1/snapshot"
TRAFFIC_PATH = "/internal/v1/traffic"
WAIT_S = 20.0
_DEADLINE_S = WAIT_S + 5.0
_FIRST_ANSWER_S = 2.0
_MIN_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0
_REPORT_S = 2.0
_REPORT_TIMEOUT_S = 2.0


class Received(NamedTuple):
    """A snapshot, and the bytes that it came as."""

    published: Published
    body: bytes


def read_snapshot(body: bytes, known: Published | None = None) -> Published:
    """Reads a snapshot and checks what decoding does not.

    Args:
        body: Its JSON.
        known: One that was checked before: versions that are the same there are not looked at again.

    Raises:
        ValueError: If it is not one that could be routed by.
    """
    published = decode(body)
    if not published.epoch or published.version < 1:
        raise ValueError("it has no epoch or no version")
    before = {} if known is None else known.versions
    for name, version in published.versions.items():
        if before.get(name) == version:
            continue
        if not is_version(name) or version.lora_id < 1 or not version.base:
            raise ValueError(f"version '{name[:200]}' has no good name, number or base")
        if not all(placement.path for placement in version.placements.values()):
            raise ValueError(f"version '{name[:200]}' is placed without a path")
    return published


class ControlFollower:
    """The gateway's view of the control plane.

    Attributes:
        published: The newest snapshot, or None.
    """

    def __init__(
        self,
        config: GatewayConfig,
        on_received: Callable[[Received], Awaitable[None]],
        tables: Sequence[SharedTable],
    ) -> None:
        """Asks nothing until `run`.

        Args:
            config: Of a gateway that has a control plane.
            on_received: Gets every new snapshot; once it returns, the gateway is said to go by it.
            tables: The adapter tables of all workers, to report from.

        Raises:
            ValueError: If the gateway has no control plane.
        """
        if config.control is None:
            raise ValueError("a gateway without a control plane has nothing to follow")
        self._control = config.control
        self._token = config.control.token.get_secret_value()
        self._folder = config.state_dir
        self._gateway = f"{socket.gethostname()}:{config.listen.port}"
        self._on_received = on_received
        self._report = TrafficReport(self._gateway, tables)
        self.published: Published | None = None
        self._has_answered = asyncio.Event()
        self._is_connected = True
        self._unwritten: bytes | None = None
        self._has_unwritten = asyncio.Event()

    def load(self) -> Received | None:
        """The snapshot on disk, for a start without the control plane; None if there is no good one."""
        if self._folder is None:
            return None
        try:
            body = published_file.read(self._folder)
            if body is None:
                return None
            self.published = read_snapshot(body)
        except (OSError, ValueError) as error:
            log.error("snapshot on disk cannot be used: %s", error)
            return None
        log.info("starts from disk", extra={"snapshot": self.published.version})
        return Received(self.published, body)

    async def first_answer(self) -> None:
        """Returns when the control plane has answered or failed once, or after two seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_ANSWER_S):
                await self._has_answered.wait()

    async def run(self) -> None:
        """Follows until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._report_traffic())
            if self._folder is not None:
                tasks.create_task(self._keep_on_disk())

    async def _follow(self) -> None:
        backoff_s = _MIN_BACKOFF_S
        while True:
            try:
                is_well = await self._poll()
            except Exception:
                # Whatever it sends, the gateway goes on with what it has.
                log.exception("following the control plane failed unexpectedly")
                is_well = False
            self._has_answered.set()
            if is_well:
                backoff_s = _MIN_BACKOFF_S
                continue
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _poll(self) -> bool:
        """Asks once; whether the answer was a good one."""
        known = self.published or Published()
        target = (
            f"{SNAPSHOT_PATH}?epoch={quote(known.epoch, safe='')}&after={known.version}"
            f"&wait_s={WAIT_S:g}&gateway={quote(self._gateway, safe='')}"
        )
        try:
            got = await get(
                self._control.host,
                self._control.port,
                target,
                timeout_s=_DEADLINE_S,
                api_key=self._token,
                max_body_bytes=published_file.MAX_BYTES,
            )
        except (OSError, UnicodeError) as error:
            self._say_connected(is_connected=False, cause=str(error) or type(error).__name__)
            return False
        self._say_connected(is_connected=got.status < 500, cause=f"status {got.status}")
        if got.status == 204:
            return True
        if got.status != 200:
            return False
        return await self._take(got.body)

    def _say_connected(self, *, is_connected: bool, cause: str) -> None:
        if is_connected != self._is_connected:
            self._is_connected = is_connected
            if is_connected:
                log.warning("control plane is back")
            else:
                log.warning("control plane is away, its last snapshot stays: %s", cause)

    async def _take(self, body: bytes) -> bool:
        known = self.published
        try:
            published = read_snapshot(body, known)
        except ValueError as error:
            log.error("snapshot refused, the one before stays: %s", error)
            return False
        if known is not None:
            if (published.epoch, published.version) == (known.epoch, known.version):
                return False  # asked for a newer one and got the same: not to be asked in a circle
            if published.epoch != known.epoch:
                log.warning("control plane has another database", extra={"epoch": published.epoch})
            elif published.version < known.version:
                log.warning("snapshot is an older one", extra={"snapshot": published.version})
        self.published = published
        await self._on_received(Received(published, body))
        self._unwritten = body
        self._has_unwritten.set()
        return True

    async def _keep_on_disk(self) -> None:
        """Writes beside the loop; of several that came meanwhile only the last."""
        loop = asyncio.get_running_loop()
        while self._folder is not None:
            await self._has_unwritten.wait()
            self._has_unwritten.clear()
            body, self._unwritten = self._unwritten, None
            if body is None:
                continue
            try:
                await loop.run_in_executor(None, published_file.write, self._folder, body)
            except OSError as error:
                log.error("snapshot cannot be kept on disk: %s", error)

    async def _report_traffic(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            body = self._report.body()
            if body is None:
                continue
            try:
                got = await post_json(
                    self._control.host,
                    self._control.port,
                    TRAFFIC_PATH,
                    body,
                    timeout_s=_REPORT_TIMEOUT_S,
                    api_key=self._token,
                )
            except (OSError, UnicodeError):
                continue  # it is part of the next report
            if got.status < 300:
                self._report.taken()
