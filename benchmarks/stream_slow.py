"""Clients that ask for long, fast streams and never read: the gateway's buffers fill up.

Called by `benchmarks/many_streams.py`.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from benchmarks.stream_fleet import PROBE_MODEL, stream_request

if TYPE_CHECKING:
    from benchmarks.stream_fleet import Fleet

_TOKENS = 1_000_000
_RECEIVE_BYTES = 4096


class SlowConnection(asyncio.Protocol):
    """Asks, and never reads."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self.transport = transport  # type: ignore[assignment]
        if self.transport is not None:
            self.transport.pause_reading()
            self.transport.write(self._request)

    def abort(self) -> None:
        """Leaves."""
        if self.transport is not None:
            self.transport.abort()


async def open_slow(fleet: Fleet, num_clients: int) -> list[SlowConnection]:
    """Opens streams that nobody reads."""
    loop = asyncio.get_running_loop()
    request = stream_request(PROBE_MODEL, _TOKENS).wire
    clients = []
    for _ in range(num_clients):
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        own.setblocking(False)
        await loop.sock_connect(own, fleet.address)
        _, client = await loop.create_connection(lambda: SlowConnection(request), sock=own)
        clients.append(client)
    return clients
