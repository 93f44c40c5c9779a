"""One stream whose events are timed: what a user sees while others crowd the gateway.

Called by `benchmarks/many_streams.py`, alone and beside each kind of load.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

import msgspec

from benchmarks import accounts
from benchmarks.exchange import ClientConnection, Outcome
from benchmarks.load import quantiles_ms
from benchmarks.stream_fleet import (
    PHASE_S,
    PROBE_INTERVAL_S,
    PROBE_MODEL,
    Fleet,
    StreamError,
    stream_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_SETTLE_S = 1.0


class Itl(msgspec.Struct, frozen=True):
    """Inter-token latency of the probe stream, and the gateway's CPU meanwhile."""

    num_events: int
    itl_ms: dict[str, float]
    cpu_cores: float
    """Cores that the gateway kept busy."""


class ProbeConnection(ClientConnection):
    """The stream whose events are timed."""

    def __init__(self, on_end: Callable[[ClientConnection, Outcome], None]) -> None:
        super().__init__(on_end)
        self.arrivals_s: list[float] = []

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        before = self.num_events
        super().on_body(body)
        now = time.monotonic()
        self.arrivals_s.extend([now] * (self.num_events - before))


async def probe(fleet: Fleet, window_s: float) -> Itl:
    """Times one stream of 50 events a second over a window.

    Raises:
        StreamError: If the stream was not what was asked for.
        TimeoutError: If it does not end.
    """
    loop = asyncio.get_running_loop()
    failures: list[str | None] = []
    request = stream_request(PROBE_MODEL, round((window_s + _SETTLE_S) / PROBE_INTERVAL_S))
    done = asyncio.Event()

    def on_end(_: ClientConnection, outcome: Outcome) -> None:
        failures.append(outcome.failure)
        done.set()

    _, one = await loop.create_connection(lambda: ProbeConnection(on_end), *fleet.address)
    cpu_s, start_s = accounts.cpu_s([fleet.gateway_pid]), time.monotonic()
    one.send(request, start_s)
    async with asyncio.timeout(PHASE_S):
        await done.wait()
    cores = (accounts.cpu_s([fleet.gateway_pid]) - cpu_s) / (time.monotonic() - start_s)
    one.close()
    if failures != [None]:
        raise StreamError(f"the probe stream was not right: {failures}")
    return _itl(one.arrivals_s, cores)


def _itl(arrivals_s: list[float], cores: float) -> Itl:
    settled_s = arrivals_s[0] + _SETTLE_S / 2
    times = [at for at in arrivals_s if at >= settled_s]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return Itl(len(times), quantiles_ms(gaps), cores)
