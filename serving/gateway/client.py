"""A client's connection: HTTP/1.1 in, requests handed on one at a time, answers in order.

First step of a request's way. Owns parsing and the order of answers; whether a head is let in is
`admission.py`'s business, what a complete request becomes is `exchange.py`'s (relayed routes) or `local.py`'s (our own). A client that closes its
connection, or the writing half of it, has left: its request is given up.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, cast

import httptools

from serving.errors import MalformedHttp, Overloaded, RequestTimeout, ServingError
from serving.gateway import answers
from serving.gateway.admission import admit, body_too_large, head_too_large
from serving.gateway.exchange import Exchange
from serving.gateway.metrics import CONNECTIONS
from serving.gateway.request import Request
from serving.gateway.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.gateway.endpoints import Endpoint
    from serving.gateway.worker import Worker

_WRITE_HIGH_WATER_BYTES = 64 * 1024
_MAX_DRAINED_BODY_BYTES = 64 * 1024
"""A refused request's body up to this size is read, so that its connection can go on."""
_MAX_PIPELINED_BODY_BYTES = 1024 * 1024
_LINGER_S = 2.0
"""How long we read on after a last answer, so that a reset does not overtake it (RFC 9112, 9.6)."""
_HOP_HEADERS = frozenset({b"upgrade", b"connection", b"http2-settings"})
_VERSIONS = ("1.1", "1.0")
_TCP_ESTABLISHED = 1  # first byte of `struct tcp_info` (linux/tcp.h)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class ClientConnection(asyncio.Protocol):
    """One client connection of a worker.

    Attributes:
        exchange: The relayed request that is being answered, if any.
        is_write_paused: Whether the client reads more slowly than we write.
        write: Sends bytes to the client.
    """

    __slots__ = (
        "_chunk_began_at",
        "_head_bytes",
        "_is_advancing",
        "_is_deaf",
        "_is_reading_paused",
        "_is_upgrade",
        "_last_data_at",
        "_owes_continue",
        "_parser",
        "_pending",
        "_raw_headers",
        "_reading",
        "_transport",
        "_worker",
        "exchange",
        "is_write_paused",
        "on_header",
        "write",
    )

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # httptools calls `on_header(name, value)`: a dict's own setter costs no Python frame.
        self._raw_headers: dict[bytes, bytes] = {}
        self.on_header = self._raw_headers.__setitem__
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self.write: Callable[[bytes], None]
        self.exchange: Exchange | None = None
        self.is_write_paused = False
        self._reading: Request | None = None
        self._pending: deque[Request] = deque()
        self._head_bytes = 0
        self._chunk_began_at = -1
        self._owes_continue = False
        self._is_deaf = False
        self._is_advancing = False
        self._is_reading_paused = False
        self._is_upgrade = False
        self._last_data_at = monotonic()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the connection in, or refuses it where there are too many."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_WATER_BYTES)
        self.write = self._transport.write
        worker = self._worker
        worker.connections.add(self)
        worker.metrics.worker.add(CONNECTIONS, 1)
        if len(worker.connections) > worker.config.limits.max_connections:
            self._refuse(Overloaded("The gateway has too many connections."))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, and with it whatever it had asked for."""
        worker = self._worker
        worker.connections.discard(self)
        worker.metrics.worker.add(CONNECTIONS, -1)
        self._leave()

    def eof_received(self) -> None:
        """The client has closed, or half-closed, its side: it has left (what was answered is flushed)."""
        self._leave()

    def _leave(self) -> None:
        self._is_deaf = True
        self._pending.clear()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()

    def pause_writing(self) -> None:
        """Backpressure: what is not read by the client is not read from the engine."""
        self.is_write_paused = True
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.is_write_paused = False
        if self.exchange is not None:
            self.exchange.resume()
        self._advance()

    def data_received(self, data: bytes) -> None:
        """Parses the next bytes and starts what has become complete."""
        if self._is_deaf:
            return
        self._last_data_at = monotonic()
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[cast("int", upgrade.args[0]) :])
        except httptools.HttpParserError as error:
            self._refuse(MalformedHttp(f"The request is not valid HTTP/1.1: {error}."))
        if self._head_bytes > self._worker.config.limits.max_head_bytes and self._is_in_headers:
            self._refuse(head_too_large(self._worker.config.limits))
        if self._pending:
            self._advance()

    # What httptools calls.

    def on_message_begin(self) -> None:
        """A request line begins."""
        self._reading = request = Request()
        request.received_at = self._last_data_at
        self._raw_headers.clear()
        self._chunk_began_at = -1

    def on_url(self, target: bytes) -> None:
        """A piece of the request target."""
        if self._reading is not None:
            self._reading.target += target

    def on_chunk_header(self) -> None:
        """A chunk of a body begins, perhaps the last, which has only trailers."""
        if self._reading is not None:
            self._head_bytes = 0
            self._chunk_began_at = self._reading.body_bytes

    def on_headers_complete(self) -> None:
        """The head is complete: everything that can be refused before the body is."""
        request = self._reading
        if request is None:
            return
        parser = self._parser
        # Trailers come after this and stay in the raw headers, unread.
        request.headers = {name.lower(): value for name, value in self._raw_headers.items()}
        request.method = parser.get_method()
        request.keep_alive = parser.should_keep_alive() and not self._worker.is_draining
        # Only a head with a `connection` header, or one that ends it, can be HTTP/1.0.
        if not request.keep_alive or b"connection" in request.headers:
            version = parser.get_http_version()
            request.is_http10 = version == "1.0"
            if version not in _VERSIONS:
                request.keep_alive = False
                request.refusal = MalformedHttp(f"HTTP/{version} is not supported; use HTTP/1.1.")
        request.inference_id = self._worker.inference_ids.next()
        self._is_upgrade = parser.should_upgrade()
        try:
            if request.refusal is None:
                admit(request, self._head_bytes, self._worker.config.limits, self._worker.api_keys)
        except ServingError as error:
            request.refusal = error
        self._expect_body(request)

    def on_body(self, body: bytes) -> None:
        """A piece of a body; a refused request's is dropped."""
        request = self._reading
        if request is None:
            return
        request.body_bytes += len(body)
        if request.refusal is not None:
            if request.body_bytes > _MAX_DRAINED_BODY_BYTES:
                self._stop_reading(request)
        elif request.body_bytes > self._worker.config.limits.max_body_bytes:
            request.body_parts.clear()
            request.refusal = body_too_large(self._worker.config.limits)
        else:
            request.body_parts.append(body)

    def on_message_complete(self) -> None:
        """A request is complete. It is started after the parser has returned."""
        request = self._reading
        if request is None or self._is_upgrade:
            return
        self._reading = None
        self._head_bytes = 0
        request.received_at = self._last_data_at
        self._pending.append(request)
        if not request.keep_alive:
            self._is_deaf = True

    def _expect_body(self, request: Request) -> None:
        """Asks for the body, reads on, or stops there: a refused client need not send it all."""
        expects = request.headers.get(b"expect", b"").lower() == b"100-continue"
        if request.refusal is None:
            if expects and not request.is_http10:
                self._owes_continue = True
                self._ask_for_body()
            return
        length = int(request.headers.get(b"content-length", b"0"))
        if expects or length > _MAX_DRAINED_BODY_BYTES:
            self._stop_reading(request)

    def _ask_for_body(self) -> None:
        """Sends the 100 that a client waits for, once all before it has been answered."""
        if self.exchange is not None or self._pending:
            return
        self._owes_continue = False
        if self._reading is not None and b"expect" in self._reading.headers:
            self.write(answers.CONTINUE)

    def _stop_reading(self, request: Request) -> None:
        """Answers a refused request without its body; the connection cannot go on after that."""
        request.keep_alive = False
        self._reading = None
        self._is_deaf = True
        request.received_at = self._last_data_at
        self._pending.append(request)

    def _refuse(self, error: ServingError) -> None:
        """Answers what cannot be parsed, in its turn, and closes."""
        if self._is_deaf:
            return
        request = self._reading or Request()
        request.inference_id = request.inference_id or self._worker.inference_ids.next()
        request.refusal = error
        self._stop_reading(request)
        self._advance()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Goes on in HTTP/1.1, as RFC 9110 section 7.8 lets a server do with an `Upgrade`.

        The parser stops after such a head. A new one gets the head again, without the offer.
        """
        request = self._reading
        self._is_upgrade = False
        if request is None or request.method == b"CONNECT":
            self._refuse(MalformedHttp("CONNECT is not supported."))
            return
        lines = [b"%b %b HTTP/1.1\r\n" % (request.method, request.target)]
        if not request.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += [
            b"%b: %b\r\n" % item for item in request.headers.items() if item[0] not in _HOP_HEADERS
        ]
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join(lines) + b"\r\n" + rest)

    # Answers, in the order of the requests.

    def _advance(self) -> None:
        """Starts the next request if none is being answered and the client reads."""
        if self._is_advancing:
            return
        self._is_advancing = True
        pending = self._pending
        while pending and self.exchange is None and not self.is_write_paused:
            self._begin(pending.popleft())
        self._is_advancing = False
        if self._owes_continue:
            self._ask_for_body()
        if pending or self._is_reading_paused:
            self._bound_pending()

    def _begin(self, request: Request) -> None:
        worker = self._worker
        if request.refusal is not None:
            self._answer_error(request, request.refusal)
        elif request.endpoint is None:
            self.write(worker.local.answer(request))
            self._after_answer(request)
        else:
            self._relay(request, request.endpoint)

    def _relay(self, request: Request, endpoint: Endpoint) -> None:
        worker = self._worker
        try:
            route = resolve(endpoint, request.body(), worker.snapshot)
        except ServingError as error:
            self._answer_error(request, error)
            return
        self.exchange = exchange = Exchange(worker, self, request, route)
        worker.exchanges.add(exchange)
        exchange.start()

    def _answer_error(self, request: Request, error: ServingError) -> None:
        """Answers and counts a request that never came to a replica."""
        worker = self._worker
        endpoint = "other" if request.endpoint is None else request.endpoint.path
        worker.metrics.of((endpoint, "", "")).finish(error.status, 0.0)
        self.write(answers.error_answer(request, error, worker.date))
        self._after_answer(request)

    def exchange_done(self, *, abort: bool) -> None:
        """The exchange has written the last byte of its response.

        Args:
            abort: Whether the response is incomplete and the client has to notice.
        """
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        if abort:
            self._reset()
            return
        self._last_data_at = monotonic()
        self._after_answer(exchange.request)
        if self._pending or self._owes_continue:
            self._advance()

    def _reset(self) -> None:
        """Closes by a TCP reset: to HTTP/1.0 an orderly end would mean that the body is whole."""
        own = self._transport.get_extra_info("socket")
        if own is not None and not self._transport.is_closing():
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._transport.abort()

    def _after_answer(self, request: Request) -> None:
        if request.keep_alive and not self._worker.is_draining:
            return
        self._is_deaf = True
        self._pending.clear()
        self._last_data_at = monotonic()
        if self._transport.can_write_eof():
            # Half-closed: the client sees the end, and what it still sends is read and dropped.
            self._transport.write_eof()
        else:
            self._transport.close()

    def _bound_pending(self) -> None:
        """Stops reading while too much has been sent ahead."""
        pending = self._pending
        held = len(pending) >= self._worker.config.limits.max_pipelined or (
            len(pending) > 0 and sum(r.body_bytes for r in pending) > _MAX_PIPELINED_BODY_BYTES
        )
        if held == self._is_reading_paused or self._transport.is_closing():
            return
        self._is_reading_paused = held
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # Deadlines and shutdown.

    @property
    def _is_in_head(self) -> bool:
        return self._reading is not None and not self._reading.method

    @property
    def _is_in_headers(self) -> bool:
        """Whether a head is being read, or the trailers of a chunked body."""
        request = self._reading
        return self._is_in_head or (
            request is not None and request.body_bytes == self._chunk_began_at
        )

    @property
    def has_unsent(self) -> bool:
        """Whether the client has yet to take bytes that were written."""
        return self._transport.get_write_buffer_size() > 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being read or answered."""
        return self.exchange is None and self._reading is None and not self._pending

    def check_deadlines(self, now: float) -> None:
        """Closes a connection that has been silent for too long; the worker's sweep calls it."""
        if self._is_reading_paused and not self._is_established():
            # Unread requests hide the client's leaving.
            self._transport.abort()
            return
        silent_s = now - self._last_data_at
        timeouts = self._worker.config.timeouts
        if self.exchange is not None:
            return
        if self._is_deaf:
            has_sent_all = not self._transport.get_write_buffer_size()
            if silent_s > (_LINGER_S if has_sent_all else timeouts.idle_s):
                self._transport.abort()
        elif self._reading is not None:
            # A head has to be complete in time, a body has to go on.
            if (
                now - self._reading.received_at > timeouts.client_head_s
                if self._is_in_head
                else silent_s > timeouts.client_body_s
            ):
                self._refuse(RequestTimeout("The request did not arrive in time."))
        elif silent_s > timeouts.keep_alive_s:
            # With bytes that nobody takes, an orderly close would never end.
            if self.has_unsent:
                self._transport.abort()
            else:
                self._transport.close()

    def _is_established(self) -> bool:
        """Whether the client's side is open, as far as the kernel can tell without reading."""
        own = self._transport.get_extra_info("socket")
        if own is None or not hasattr(socket, "TCP_INFO"):
            return True
        return bool(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_ESTABLISHED)

    def close_if_idle(self) -> None:
        """Part of draining: connections without work are closed at once."""
        if self.is_idle:
            self._transport.close()

    def abort(self) -> None:
        """Ends the connection, whatever it does."""
        self._transport.abort()
