"""Which snapshot each gateway has.

Owns the record of what gateways say when they poll. Never talks to them. `routes/snapshot.py` tells
it; the reconciler waits here before it probes or unloads, and changes before they are answered.

A gateway that polls with `after=N` has N in effect. One not heard of for the time to live is gone:
it serves on from the snapshot that it has, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_GATEWAYS = 1024


@dataclass
class _Heard:
    version: int
    at_s: float
    num_polls: int = 0


@dataclass(frozen=True, slots=True)
class GatewayAck:
    """What one gateway has.

    Attributes:
        gateway: Its name.
        version: Of the snapshot that it has.
        heard_s_ago: Seconds since its last poll began or ended; 0 while one waits.
    """

    gateway: str
    version: int
    heard_s_ago: float


class GatewayAcks:
    """The live gateways' snapshot versions; belongs to the event loop."""

    def __init__(self, ttl_s: float, grace_s: float = 0.0) -> None:
        """Know no gateway yet.

        Args:
            ttl_s: A gateway not heard of for this long counts as gone.
            grace_s: From now, how long some may still be coming back: nobody knows yet whether all
                that live have a snapshot.
        """
        self._complete_at_s = time.monotonic() + grace_s
        self._ttl_s = ttl_s
        self._heard: dict[str, _Heard] = {}
        self._changed = asyncio.Event()

    @contextmanager
    def polling(self, gateway: str, version: int) -> Iterator[None]:
        """Note that a gateway has a snapshot; it is live while the block lasts, and the ttl after.

        Args:
            gateway: Its name.
            version: Of the snapshot; 0 for none of the present epoch.
        """
        self._drop_gone()
        heard = self._heard.get(gateway)
        if heard is None:
            # The oldest makes room: names are the gateways' own choice.
            if len(self._heard) >= MAX_GATEWAYS:
                del self._heard[min(self._heard, key=lambda name: self._heard[name].at_s)]
            heard = self._heard[gateway] = _Heard(version, 0.0)
        heard.version, heard.at_s = version, time.monotonic()
        heard.num_polls += 1
        self._tell()
        try:
            yield
        finally:
            heard.num_polls -= 1
            heard.at_s = time.monotonic()

    def live(self) -> list[GatewayAck]:
        """What each live gateway has."""
        self._drop_gone()
        now_s = time.monotonic()
        return [
            GatewayAck(name, heard.version, 0.0 if heard.num_polls else now_s - heard.at_s)
            for name, heard in sorted(self._heard.items())
        ]

    async def wait(self, version: int, timeout_s: float) -> bool:
        """Wait until every live gateway has this snapshot or a newer one.

        Args:
            version: Number of the snapshot.
            timeout_s: How long, in seconds.

        Returns:
            Whether they all have it; true without gateways, once they have had time to come.
        """
        end_s = time.monotonic() + timeout_s
        while self._is_awaited(version):
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return False
            try:
                # A gateway that goes away without a word is noticed by time alone.
                async with asyncio.timeout(min(left_s, 0.5)):
                    await self._changed.wait()
            except TimeoutError:
                continue
        return True

    def _is_awaited(self, version: int) -> bool:
        if time.monotonic() < self._complete_at_s:
            return True
        return any(ack.version < version for ack in self.live())

    def _drop_gone(self) -> None:
        oldest_s = time.monotonic() - self._ttl_s
        gone = [
            name
            for name, heard in self._heard.items()
            if not heard.num_polls and heard.at_s < oldest_s
        ]
        for name in gone:
            del self._heard[name]
        if gone:
            self._tell()

    def _tell(self) -> None:
        woken, self._changed = self._changed, asyncio.Event()
        woken.set()
