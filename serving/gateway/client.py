"""A client's connection: requests handed on one at a time, answers in their order.

Owns the connection's life and its deadlines. What comes in is read by `request_reader.py`; what a
complete request becomes is `exchange.py`'s business (relayed routes) or `local.py`'s (our own). A
client that closes its connection, or the writing half of it, has left: its request is given up.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, cast

from serving.errors import Overloaded, RequestTimeout, ServingError
from serving.gateway import answers
from serving.gateway.control_relay import ControlExchange
from serving.gateway.endpoints import STORED_RESPONSE
from serving.gateway.exchange import Exchange
from serving.gateway.form_body import FormBody, resolve_form
from serving.gateway.form_exchange import FormExchange
from serving.gateway.metrics import CONNECTIONS
from serving.gateway.probe import PROBE_HEADER, exchange_of
from serving.gateway.request_reader import RequestReader
from serving.gateway.resolve import resolve, resolve_stored

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.gateway.endpoints import Endpoint
    from serving.gateway.request import Request
    from serving.gateway.worker import Worker

_WRITE_HIGH_WATER_BYTES = 64 * 1024
_MAX_PIPELINED_BODY_BYTES = 1024 * 1024
_LINGER_S = 2.0
"""How long we read on after a last answer, so that a reset does not overtake it (RFC 9112, 9.6)."""
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
        "_is_advancing",
        "_is_body_held",
        "_is_reading_paused",
        "_owes_continue",
        "_pending",
        "_reader",
        "_transport",
        "_worker",
        "exchange",
        "is_write_paused",
        "write",
    )

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._reader = RequestReader(worker, self)
        self._transport: asyncio.Transport
        self.write: Callable[[bytes], None]
        self.exchange: Exchange | ControlExchange | None = None
        self.is_write_paused = False
        self._pending: deque[Request] = deque()
        self._owes_continue = False
        self._is_advancing = False
        self._is_reading_paused = False
        self._is_body_held = False

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
        self._reader.is_deaf = True
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
        """Reads on, and starts what has become complete."""
        self._reader.feed(data)
        if self._pending:
            self._advance()

    # What the reader reports.

    def request_read(self, request: Request) -> None:
        """A request can be answered or relayed. It is started after the parser has returned."""
        self._pending.append(request)

    def owe_continue(self) -> None:
        """The client waits for a 100 before it sends its body."""
        self._owes_continue = True
        self._ask_for_body()

    def _refuse(self, error: ServingError) -> None:
        """Answers in its turn what cannot be served, and closes."""
        self._reader.refuse(error)
        self._advance()

    def _ask_for_body(self) -> None:
        """Sends the 100 that a client waits for, once all before it has been answered."""
        if self.exchange is not None or self._pending:
            return
        self._owes_continue = False
        if self._reader.reading is not None and b"expect" in self._reader.reading.headers:
            self.write(answers.CONTINUE)

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
        try:
            exchange = self._exchange_of(request, endpoint)
        except ServingError as error:
            if request.streamed is not None:
                request.keep_alive = request.keep_alive and request.streamed.is_complete
                request.streamed.close()
            self._answer_error(request, error)
            return
        self.exchange = exchange
        self._worker.exchanges.add(exchange)
        exchange.start()

    def _exchange_of(self, request: Request, endpoint: Endpoint) -> Exchange | ControlExchange:
        worker, streamed = self._worker, request.streamed
        if streamed is None:
            if endpoint is STORED_RESPONSE:
                route = resolve_stored(request.path, request.target, worker.snapshot)
            else:
                route = resolve(endpoint, request.body(), worker.snapshot)
            if PROBE_HEADER in request.headers:
                return exchange_of(worker, self, request, route)
            return Exchange(worker, self, request, route)
        if isinstance(streamed, FormBody):
            route = resolve_form(endpoint, streamed, worker.snapshot)
            return FormExchange(worker, self, request, route, streamed)
        return ControlExchange(worker, self, request, streamed)

    def _answer_error(self, request: Request, error: ServingError) -> None:
        """Answers and counts a request that never came to a replica."""
        worker = self._worker
        endpoint = "other" if request.endpoint is None else request.endpoint.path
        worker.metrics.of((endpoint, "", "")).finish(error.status, 0.0)
        if worker.tracer is not None and request.endpoint is not None:
            worker.tracer.refused(request, error)
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
        self._reader.last_data_at = monotonic()
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
        self._reader.is_deaf = True
        self._pending.clear()
        self._reader.last_data_at = monotonic()
        if self._transport.can_write_eof():
            # Half-closed: the client sees the end, and what it still sends is read and dropped.
            self._transport.write_eof()
        else:
            self._transport.close()

    def hold_body(self, is_held: bool) -> None:
        """Whoever reads the body that is being sent is slower than the client, or has caught up."""
        if is_held != self._is_body_held:
            self._is_body_held = is_held
            self._bound_pending()

    def _bound_pending(self) -> None:
        """Stops reading while too much has been sent ahead, or what is sent does not flow on."""
        pending = self._pending
        held = (
            self._is_body_held
            or len(pending) >= self._worker.config.limits.max_pipelined
            or (len(pending) > 0 and sum(r.body_bytes for r in pending) > _MAX_PIPELINED_BODY_BYTES)
        )
        if held == self._is_reading_paused or self._transport.is_closing():
            return
        self._is_reading_paused = held
        if held:
            self._transport.pause_reading()
        else:
            # While we did not read, the client could not be heard.
            self._reader.last_data_at = monotonic()
            self._transport.resume_reading()

    # Deadlines and shutdown.

    @property
    def has_unsent(self) -> bool:
        """Whether the client has yet to take bytes that were written."""
        return self._transport.get_write_buffer_size() > 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being read or answered."""
        return self.exchange is None and self._reader.reading is None and not self._pending

    def check_deadlines(self, now: float) -> None:
        """Closes a connection that has been silent for too long; the worker's sweep calls it."""
        if self._is_reading_paused and not self._is_established():
            # Unread requests hide the client's leaving.
            self._transport.abort()
            return
        silent_s = now - self._reader.last_data_at
        timeouts = self._worker.config.timeouts
        if self.exchange is not None and not self._is_receiving:
            return
        if self._reader.is_deaf:
            has_sent_all = not self._transport.get_write_buffer_size()
            if silent_s > (_LINGER_S if has_sent_all else timeouts.idle_s):
                self._transport.abort()
        elif self._reader.reading is not None:
            if self._is_late(self._reader.reading, now):
                self._refuse(RequestTimeout("The request did not arrive in time."))
        elif silent_s > timeouts.keep_alive_s:
            # With bytes that nobody takes, an orderly close would never end.
            if self.has_unsent:
                self._transport.abort()
            else:
                self._transport.close()

    @property
    def _is_receiving(self) -> bool:
        """Whether the body of the request that is being relayed comes, or should."""
        reading = self._reader.reading
        return (
            reading is not None
            and self.exchange is not None
            and reading is self.exchange.request
            and not self._is_reading_paused
        )

    def _is_late(self, reading: Request, now: float) -> bool:
        """A head has to be complete in time, a body has to go on, and to end some time."""
        timeouts = self._worker.config.timeouts
        began_s = now - reading.received_at
        if self._reader.is_in_head:
            return began_s > timeouts.client_head_s
        if now - self._reader.last_data_at > timeouts.client_body_s:
            return True
        # An adapter of gigabytes may take long, as long as it goes on.
        is_control = reading.endpoint is not None and reading.endpoint.kind == "control"
        return began_s > timeouts.client_body_total_s and not is_control

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
