"""One HTTP/1.1 connection of the simulated engine: parses requests and writes answers, one at a time."""

from __future__ import annotations

from asyncio import Protocol, Transport
from collections import deque
from typing import TYPE_CHECKING, cast

import httptools

if TYPE_CHECKING:
    from asyncio import BaseTransport

    from benchmarks.engine_sim.answer import Answer
    from benchmarks.engine_sim.engine import Engine
    from benchmarks.engine_sim.routes import Routes

MAX_BODY_BYTES = 64 * 1024 * 1024
_MAX_PIPELINED = 16
_BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 30\r\nconnection: close\r\n\r\nInvalid HTTP request received."
)
_TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class SimConnection(Protocol):
    """One client's connection. Its engine is told when it closes in the middle of an answer."""

    def __init__(self, routes: Routes, engine: Engine, open_ones: set[SimConnection]) -> None:
        self._open_ones = open_ones
        self._routes = routes
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._transport: Transport | None = None
        self._url = b""
        self._body: list[bytes] = []
        self._num_body_bytes = 0
        self._request_id: str | None = None
        self._pending: deque[tuple[bytes, bytes, bytes, str | None, bool]] = deque()
        self._is_busy = False
        self._answer: Answer | None = None
        self._is_keep_alive = True

    # What the event loop calls.

    def connection_made(self, transport: BaseTransport) -> None:
        """Keeps the transport."""
        self._transport = cast("Transport", transport)
        self._open_ones.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever the engine still does for this client is of no use any more."""
        self._transport = None
        self._open_ones.discard(self)
        self._pending.clear()
        answer, self._answer = self._answer, None
        if answer is not None:
            self._engine.abort(answer)

    def data_received(self, data: bytes) -> None:
        """Parses."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end_with(_BAD_REQUEST)

    # What httptools calls.

    def on_message_begin(self) -> None:
        """A request begins."""
        self._url = b""
        self._body = []
        self._num_body_bytes = 0
        self._request_id = None

    def on_url(self, url: bytes) -> None:
        """A piece of its target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers."""
        if len(name) == 12 and name.lower() == b"x-request-id":
            self._request_id = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """A piece of its body."""
        self._num_body_bytes += len(body)
        if self._num_body_bytes > MAX_BODY_BYTES:
            self._end_with(_TOO_LARGE)
            return
        self._body.append(body)

    def on_message_complete(self) -> None:
        """It is whole."""
        if self._transport is None or self._transport.is_closing():
            return
        if len(self._pending) >= _MAX_PIPELINED:
            self._end_with(_BAD_REQUEST)
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        path = self._url.partition(b"?")[0]
        keeps = self._parser.should_keep_alive()
        self._pending.append((self._parser.get_method(), path, body, self._request_id, keeps))
        self._next()

    def abort(self) -> None:
        """The server ends."""
        if self._transport is not None:
            self._transport.abort()

    # What answers call.

    def write(self, piece: bytes) -> None:
        """Sends bytes, or nothing once the client has gone."""
        if self._transport is not None:
            self._transport.write(piece)

    def wait_for(self, answer: Answer) -> None:
        """The engine works on it."""
        self._answer = answer

    def finish(self) -> None:
        """The answer is complete; the next request that has come is taken."""
        self._answer = None
        self._is_busy = False
        if not self._is_keep_alive and self._transport is not None:
            self._transport.close()
            return
        self._next()

    def _next(self) -> None:
        if self._is_busy or not self._pending:
            return
        self._is_busy = True
        method, path, body, request_id, self._is_keep_alive = self._pending.popleft()
        self._routes.handle(self, method, path, body, request_id)

    def _end_with(self, response: bytes) -> None:
        if self._transport is not None:
            if not self._is_busy:
                self._transport.write(response)
            self._transport.close()
