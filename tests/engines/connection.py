"""One client's connection to a dialect server: parsing, performing replies, noticing that it left.

Created by `base_server.py`, which owns the accounts.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, cast

import httptools
from scripted_engine import MAX_BUFFERED_BYTES, STREAM_HEAD, Act, Seen, Step, head

if TYPE_CHECKING:
    from base_server import EngineServer

Reply = Generator[Step, None, None]


def sized(status: int, body: bytes, content_type: str = "application/json") -> tuple[bytes, bytes]:
    """Head and body of a response with a content-length."""
    lines = (f"content-length: {len(body)}", f"content-type: {content_type}")
    return head(status, *lines), body


class Connection(asyncio.Protocol):
    """One connection: parses requests, performs a reply for each, notices that the client left."""

    transport: asyncio.Transport

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._number = 0
        self._url = b""
        self._raw_headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._pending: deque[tuple[Seen, bool]] = deque()
        self._performing: asyncio.Task[None] | None = None
        self._is_streaming = False
        self._is_keep_alive = True
        self._late: asyncio.TimerHandle | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=MAX_BUFFERED_BYTES)
        self._server.add(self)
        self._number = self._server.counts.connections
        if self._server.switches.reset == "on_connect":
            self.reset()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            refusal = sized(400, b"Invalid HTTP request received.", "text/plain; charset=utf-8")
            self.transport.write(b"".join(refusal))
            self.transport.close()

    def eof_received(self) -> None:
        self._other_side_left()

    def connection_lost(self, exc: Exception | None) -> None:
        self._may_write.set()
        self._other_side_left()
        self._server.discard(self)

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    # What httptools calls.

    def on_message_begin(self) -> None:
        self._url = b""
        self._raw_headers = []
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._raw_headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        method = self._parser.get_method()
        lines = [b"%b %b HTTP/1.1" % (method, self._url)]
        lines += [b"%b: %b" % pair for pair in self._raw_headers]
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in self._raw_headers
        }
        seen = Seen(
            method.decode(),
            self._url.decode("latin-1"),
            headers,
            b"\r\n".join(lines),
            b"".join(self._body),
            self._number,
        )
        self._pending.append((seen, self._parser.should_keep_alive()))
        self._next_request()

    # Performing.

    async def perform(self, reply: Reply) -> None:
        """Does the reply's steps, one by one; closed early, it gives back what it holds."""
        with closing(reply):
            for step in reply:
                if isinstance(step, Act):
                    await self._act(step)
                    return
                if isinstance(step, bytes):
                    await self._send(step)
                elif isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    await asyncio.sleep(step)
        self._done()
        if not self._is_keep_alive:
            self.transport.close()
        self._next_request()

    def reset(self) -> None:
        """Closes with a TCP reset."""
        own = self.transport.get_extra_info("socket")
        if own is not None and not self.transport.is_closing():
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def end(self) -> None:
        """Ends with the server: nothing goes on behind its back."""
        performing = self._performing
        self._done()
        if performing is not None:
            performing.cancel()
        self.reset()

    async def _send(self, piece: bytes) -> None:
        await self._may_write.wait()
        self._is_streaming = self._is_streaming or piece == STREAM_HEAD
        if not self.transport.is_closing():
            self.transport.write(piece)
            self._server.counts.bytes_sent += len(piece)
        # The other side's loop may be this one: turns let it read before the next piece.
        for _ in range(3):
            await asyncio.sleep(0)

    async def _act(self, act: Act) -> None:
        if act is Act.HANG:
            await asyncio.Event().wait()
        self._done()
        if act is Act.RESET:
            self.reset()
        else:
            self.transport.close()

    def _next_request(self) -> None:
        if self._performing is None and self._pending and not self.transport.is_closing():
            seen, self._is_keep_alive = self._pending.popleft()
            self._is_streaming = False
            self._performing = self._server.start(self, seen)

    def _done(self) -> None:
        self._performing = None
        self._server.done(self)
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _other_side_left(self) -> None:
        if self._performing is None or self._late is not None:
            return
        switches = self._server.switches
        late_s = switches.stream_disconnect_s if self._is_streaming else switches.disconnect_s
        self._late = asyncio.get_running_loop().call_later(late_s, self._abort)

    def _abort(self) -> None:
        performing = self._performing
        self._done()
        if performing is not None:
            self._server.counts.aborts += 1
            performing.cancel()
