"""Connections to replicas: one HTTP/1.1 response at a time, kept alive and used again.

An `UpstreamConnection` frames the bytes of a response and hands them to its reader: the exchange
(`exchange.py`) until the response has begun, a relay (`relay.py`) after that. The pool owns idle
connections; a busy one belongs to its reader.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from serving.errors import InternalError, UpstreamBroken
from serving.gateway.keepalive import probe_when_silent

if TYPE_CHECKING:
    from serving.errors import ServingError
    from serving.gateway.streamed_body import StreamedBody
    from serving.routing.snapshot import Replica

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65_536
MAX_IDLE_PER_REPLICA = 1024
IDLE_S = 4.0
"""vLLM's server closes an idle connection after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); ours go first,
so that a request seldom meets a connection that is being closed."""
_WRITE_HIGH_WATER_BYTES = 1024 * 1024


class Reader(Protocol):
    """Who reads the response of a busy connection."""

    def on_block(self, block: bytes) -> None:
        """The head is complete and these bytes came; `parts` holds the body bytes among them."""

    def upstream_failed(self, error: ServingError) -> None:
        """What came is not a response."""

    def upstream_lost(self) -> None:
        """The connection is closed."""


class Requester(Protocol):
    """Who waits for a connection."""

    def connected(self, connection: UpstreamConnection) -> None:
        """It is open."""

    def connect_failed(self, replica: Replica) -> None:
        """It could not be opened."""

    def upstream_failed(self, error: ServingError) -> None:
        """The attempt broke by a fault of ours."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to a replica.

    Attributes:
        parts: Body bytes of the current response since the reader last took them, dechunked.
        status: Status of the current response, 0 until its head has come.
        headers: Its headers, lower-case names.
        is_complete: Whether the response has ended.
        is_reused: Whether it has served a request before, so that a reset may mean "went stale".
        idle_since: `time.monotonic()` of its return to the pool.
        body: The request body that is sent while it comes, if any.
        is_write_paused: Whether the replica reads more slowly than we write.
    """

    __slots__ = (
        "_feed",
        "_head_bytes",
        "_is_keep_alive",
        "_parser",
        "_pool",
        "_raw_headers",
        "body",
        "headers",
        "idle_since",
        "is_complete",
        "is_reused",
        "is_write_paused",
        "on_body",
        "on_header",
        "parts",
        "reader",
        "replica",
        "status",
        "transport",
    )

    def __init__(self, pool: UpstreamPool, replica: Replica) -> None:
        self._pool = pool
        self.replica = replica
        self.reader: Reader | None = None
        self.transport: asyncio.Transport
        self.parts: list[bytes] = []
        # httptools calls these for each piece: the containers' own methods cost no Python frame.
        self.on_body = self.parts.append
        self._raw_headers: dict[bytes, bytes] = {}
        self.on_header = self._raw_headers.__setitem__
        self.headers: dict[bytes, bytes] = {}
        self.status = 0
        self.is_complete = False
        self.is_reused = False
        self.idle_since = 0.0
        self.body: StreamedBody | None = None
        self.is_write_paused = False
        self._head_bytes = 0
        self._is_keep_alive = False
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data

    # What httptools calls.

    def on_headers_complete(self) -> None:
        """The head is complete; interim responses (1xx) are skipped."""
        status = self._parser.get_status_code()
        raw = self._raw_headers
        if status < 200:
            raw.clear()
        elif self.status:
            raise UpstreamBroken("The engine sent a second response.")
        else:
            self.status = status
            # Trailers come after this and stay in the raw headers, unread.
            self.headers = {name.lower(): value for name, value in raw.items()}
            raw.clear()
            # Asked here: llhttp forgets the answer when the message ends.
            self._is_keep_alive = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        """The end of a response, or of an interim one."""
        self.is_complete = bool(self.status)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_WRITE_HIGH_WATER_BYTES)
        probe_when_silent(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        """Frames the next bytes and hands them to the reader."""
        reader = self.reader
        feed = self._feed
        if reader is None:
            # Nothing was asked: whatever this is, the connection cannot be trusted again.
            self.transport.abort()
            return
        try:
            feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._is_keep_alive = False
            reader.upstream_failed(UpstreamBroken("The engine's response is not valid HTTP."))
            return
        if self.status:
            reader.on_block(data)
            self.parts.clear()
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            reader.upstream_failed(UpstreamBroken("The engine's response head is too large."))

    def pause_writing(self) -> None:
        """The replica is slow to read: so are we to read what is meant for it."""
        self.is_write_paused = True
        if self.body is not None:
            self.body.hold()

    def resume_writing(self) -> None:
        """The replica has caught up."""
        self.is_write_paused = False
        if self.body is not None:
            self.body.go_on()

    def eof_received(self) -> None:
        """The replica sends no more. What it has not read of a body, it will not read."""
        if self.body is not None and not self.body.is_complete:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells whoever owns the connection."""
        reader, self.reader = self.reader, None
        if reader is None:
            self._pool.forget(self)
        else:
            reader.upstream_lost()

    # What the reader calls.

    def begin(self, reader: Reader, payload: bytes) -> None:
        """Sends a request; its response goes to `reader`."""
        self.reader = reader
        self._raw_headers.clear()
        self.status = 0
        self.is_complete = False
        self._head_bytes = 0
        self.transport.write(payload)

    @property
    def is_close_delimited(self) -> bool:
        """Whether the body ends with the connection (RFC 9112, section 6.3)."""
        headers = self.headers
        return b"content-length" not in headers and b"transfer-encoding" not in headers

    def release(self) -> None:
        """Gives the connection back: to the pool if it can serve again, else it is closed."""
        self.reader = None
        self.parts.clear()
        body, self.body = self.body, None
        is_sent = body is None or body.is_complete
        if self.is_complete and self._is_keep_alive and is_sent:
            self._pool.give_back(self)
        else:
            self.transport.abort()


class UpstreamPool:
    """Idle connections by replica, and the making of new ones.

    Attributes:
        connect_timeout_s: Deadline of a connect, the TLS handshake included.
    """

    def __init__(self, tasks: asyncio.TaskGroup, connect_timeout_s: float) -> None:
        """Starts empty.

        Args:
            tasks: Owns the connect attempts.
            connect_timeout_s: Deadline of one.
        """
        self._tasks = tasks
        self.connect_timeout_s = connect_timeout_s
        self._idle: dict[int, list[UpstreamConnection]] = {}

    def take(self, replica: Replica) -> UpstreamConnection | None:
        """The most recently used idle connection: it is the least likely to have gone stale."""
        idle = self._idle.get(replica.index)
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    def connect(self, replica: Replica, requester: Requester) -> None:
        """Opens a connection; the requester is called back with it or with the failure."""
        self._tasks.create_task(self._connect(replica, requester))

    async def _connect(self, replica: Replica, requester: Requester) -> None:
        """The task of one attempt; whatever goes wrong in it stays the matter of one request."""
        try:
            await self._open(replica, requester)
        except Exception:
            log.exception("a request failed unexpectedly", extra={"replica": replica.name})
            requester.upstream_failed(InternalError("The gateway failed on this request."))

    async def _open(self, replica: Replica, requester: Requester) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self, replica),
                    replica.host,
                    replica.port,
                    ssl=replica.tls,
                    server_hostname=replica.host if replica.tls else None,
                )
        except (OSError, UnicodeError):  # a deadline is an OSError, a bad host name a UnicodeError
            requester.connect_failed(replica)
            return
        if connection.transport.is_closing():
            # Accepted and closed at once: it is lost already, nobody would be told of that again.
            requester.connect_failed(replica)
            return
        requester.connected(connection)

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keeps a connection for the next request."""
        idle = self._idle.setdefault(connection.replica.index, [])
        if len(idle) >= MAX_IDLE_PER_REPLICA or connection.transport.is_closing():
            connection.transport.abort()
            return
        connection.is_reused = True
        connection.idle_since = monotonic()
        idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """Drops an idle connection that its replica has closed."""
        idle = self._idle.get(connection.replica.index, [])
        if connection in idle:
            idle.remove(connection)

    def close_idle(self, unused_since: float) -> None:
        """Closes what has not been used since that moment (`time.monotonic()`)."""
        for idle in self._idle.values():
            # The oldest are first: `take` and `give_back` work at the end.
            while idle and idle[0].idle_since <= unused_since:
                idle.pop(0).transport.abort()

    def drop(self, replica: Replica) -> None:
        """Closes all idle connections of a replica, after one of them turned out stale."""
        for connection in self._idle.pop(replica.index, []):
            connection.transport.abort()
