"""Many streams at once through one gateway: opened, checked to their end, some of them reset.

Called by `benchmarks/many_streams.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from benchmarks.exchange import ClientConnection, Outcome, Request
from benchmarks.stream_fleet import (
    CROWD_INTERVAL_S,
    CROWD_MODEL,
    PHASE_S,
    POLL_S,
    Fleet,
    StreamError,
    running_requests,
    stream_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_CONNECTS_AT_ONCE = 100
_MAX_LEAVING = 1000
_MEBIBYTE = 1024 * 1024
_OPENS_PER_S = 400
"""At least: decides how long the streams have to be."""
_SLACK_S = 15.0


class CrowdResult(msgspec.Struct, frozen=True):
    """The many streams."""

    streams: int
    open_s: float
    """From the first connect until every stream had its first event."""
    rss_before_mib: float
    rss_peak_mib: float
    kib_per_stream: float
    events: int
    """Events of all streams, until they ended or left."""
    completed: int
    failures: dict[str, int]


class Leaving(msgspec.Struct, frozen=True):
    """Clients that leave at once."""

    clients: int
    running_before: int
    freed_s: float
    """From the first reset until the engines ran so many requests less."""


class Crowd:
    """The streams of one run over a fleet."""

    def __init__(self, fleet: Fleet, num_streams: int) -> None:
        self._fleet = fleet
        self._num_streams = num_streams
        self._gateway = psutil.Process(fleet.gateway_pid)
        self._streams: list[ClientConnection] = []
        self._ended: Counter[str] = Counter()
        self._num_completed = 0
        self._has_left = False

    def rss_mib(self) -> float:
        """Resident memory of the gateway now."""
        return float(self._gateway.memory_info().rss) / _MEBIBYTE

    def peak_rss_mib(self) -> float:
        """The most that it has ever been, by the kernel."""
        status = Path(f"/proc/{self._fleet.gateway_pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024

    async def open(self, window_s: float) -> float:
        """Starts all streams, each long enough for a probe's window and the leaving.

        Returns:
            After how many seconds each had its first event.

        Raises:
            StreamError: If not every stream begins.
        """
        start_s = time.monotonic()
        # Long enough for opening, the probe and the leaving, on a slow machine too.
        lasts_s = self._num_streams / _OPENS_PER_S + 2 * window_s + _SLACK_S
        request = stream_request(CROWD_MODEL, round(lasts_s / CROWD_INTERVAL_S))
        left = self._num_streams
        while left:
            async with asyncio.timeout(PHASE_S), asyncio.TaskGroup() as tasks:
                for _ in range(min(left, _CONNECTS_AT_ONCE)):
                    tasks.create_task(self._open(request))
                    left -= 1
        await self._until(
            lambda: all(one.num_events or not one.is_open for one in self._streams),
            "not every stream had its first event",
        )
        return time.monotonic() - start_s

    async def _open(self, request: Request) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: ClientConnection(self._on_end), *self._fleet.address
        )
        self._streams.append(connection)
        connection.send(request, time.monotonic())

    def _on_end(self, _: ClientConnection, outcome: Outcome) -> None:
        if outcome.failure is None:
            self._num_completed += 1
        elif not self._has_left:
            self._ended[outcome.failure] += 1

    async def leave(self) -> Leaving:
        """Resets a thousand clients at once and watches the engines.

        Raises:
            StreamError: If the engines go on for them.
        """
        leaving = self._streams[:_MAX_LEAVING]
        before = await self._running()
        self._has_left = True
        start_s = time.monotonic()
        for connection in leaving:
            connection.close()
        end_s = start_s + PHASE_S
        while await self._running() > before - len(leaving):
            if time.monotonic() > end_s:
                raise StreamError("the engines still work for clients that have left")
            await asyncio.sleep(POLL_S)
        freed_s = time.monotonic() - start_s
        await asyncio.sleep(0)
        self._has_left = False
        return Leaving(len(leaving), before, freed_s)

    async def _running(self) -> int:
        loop = asyncio.get_running_loop()
        counts = [
            await loop.run_in_executor(None, running_requests, port)
            for port in self._fleet.crowd_ports
        ]
        return sum(counts)

    async def finish(self) -> None:
        """Waits until the streams that are left have ended, all their events checked.

        Raises:
            StreamError: If they do not end.
        """
        await self._until(
            lambda: all(not one.is_busy for one in self._streams if one.is_open),
            "streams do not end",
        )
        for connection in self._streams:
            connection.close()
        await asyncio.sleep(0)

    async def _until(self, condition: Callable[[], bool], complaint: str) -> None:
        end_s = time.monotonic() + PHASE_S
        while not condition():
            if time.monotonic() > end_s:
                raise StreamError(complaint)
            await asyncio.sleep(POLL_S)

    def result(self, open_s: float, rss_before_mib: float, peak_mib: float) -> CrowdResult:
        """What became of the many."""
        return CrowdResult(
            streams=self._num_streams,
            open_s=open_s,
            rss_before_mib=rss_before_mib,
            rss_peak_mib=peak_mib,
            kib_per_stream=(peak_mib - rss_before_mib) * 1024 / self._num_streams,
            events=sum(connection.num_events for connection in self._streams),
            completed=self._num_completed,
            failures=dict(self._ended),
        )
