"""What is not inference, relayed to the control plane: both bodies stream, nothing is read of them.

Owns which headers pass and what a control plane that is not there means. Never decides who may come:
`admission.py` has. Inference does not depend on any of this. Called by `client.py`.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from serving.engines import dialect_of
from serving.errors import (
    BadRequest,
    ControlPlaneUnavailable,
    DeadlineExceeded,
    NoControlPlane,
    ServingError,
)
from serving.gateway import answers, metrics
from serving.gateway.sse import LAST_CHUNK, chunk
from serving.routing.snapshot import Replica

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import ControlPlane
    from serving.gateway.client import ClientConnection
    from serving.gateway.request import Request
    from serving.gateway.streamed_body import StreamedBody
    from serving.gateway.upstream import UpstreamConnection
    from serving.gateway.worker import Worker

CONTROL_INDEX = -1
"""No replica has it: the pool keeps connections by index."""
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
"""RFC 9110, section 7.6.1; whatever `connection` names is one too."""
_OWN_REQUEST = frozenset(
    {b"host", b"authorization", b"x-api-key", b"x-request-id", b"content-length", b"expect"}
)
_OWN_RESPONSE = frozenset({b"content-length", b"date", b"x-request-id"})
_OWN_PREFIXES = (b"x-headrace-", b"x-forwarded-", b"forwarded")
"""Ours to say: a client could claim to be somebody else."""


def control_target(control: ControlPlane | None) -> Replica | None:
    """Where the pool connects to."""
    if control is None:
        return None
    # Its dialect is never asked: nothing of what passes is an engine's.
    return Replica(CONTROL_INDEX, "control plane", control.host, control.port, dialect_of("vllm"))


def check_control_path(path: str) -> None:
    """Refuses paths that a server behind us could take for another one.

    Raises:
        BadRequest: If there are dot segments or encoded separators in it.
    """
    for segment in path.split("/"):
        plain = unquote(segment, encoding="latin-1")
        if plain in (".", "..") or any(sign in plain for sign in "/\\%#\0"):
            raise BadRequest("The path must not have dot segments or encoded separators in it.")


class ControlExchange:
    """A request, the connection to the control plane, and the relay of both bodies."""

    __slots__ = (
        "_body",
        "_control",
        "_frames",
        "_has_begun",
        "_is_done",
        "_is_waiting",
        "_last_at",
        "_may_retry",
        "_upstream",
        "client",
        "request",
        "series",
        "worker",
    )

    def __init__(
        self, worker: Worker, client: ClientConnection, request: Request, body: StreamedBody
    ) -> None:
        """Begins nothing yet.

        Raises:
            NoControlPlane: If there is none.
        """
        if worker.control is None:
            raise NoControlPlane("This gateway has no control plane.")
        self.worker = worker
        self.client = client
        self.request = request
        endpoint = "" if request.endpoint is None else request.endpoint.path
        self.series = worker.metrics.of((endpoint, "", ""))
        self._control = worker.control
        self._body = body
        self._upstream: UpstreamConnection | None = None
        # What changes something is never sent twice, so it gets a connection that cannot be stale.
        self._may_retry = request.method in (b"GET", b"HEAD")
        self._is_waiting = False
        self._has_begun = False
        self._is_done = False
        self._frames = False
        self._last_at = monotonic()
        body.relayer = self

    def start(self) -> None:
        """Connects, or takes an idle connection."""
        self.series.add(metrics.IN_FLIGHT, 1)
        pool = self.worker.pool
        connection = pool.take(self._control) if self._may_retry else None
        if connection is None:
            pool.connect(self._control, self)
        else:
            self.connected(connection)

    # The way in.

    def connected(self, connection: UpstreamConnection) -> None:
        """The connection is open: head and body follow."""
        if self._is_done:
            self.worker.pool.give_back(connection)
            return
        if not self._body.is_complete and self.request.expects_continue:
            self.client.write(answers.CONTINUE)
        self._upstream = connection
        self._is_waiting = True
        self._last_at = monotonic()
        connection.begin(self, self._payload())
        self._body.flow_to(connection)

    def _payload(self) -> bytes:
        request, body = self.request, self._body
        _, mark, query = request.target.partition(b"?")
        target = request.path.encode("latin-1") + mark + query
        framing = b""
        if body.length_bytes is None:
            framing = b"transfer-encoding: chunked\r\n"
        elif b"content-length" in request.headers:
            framing = b"content-length: %d\r\n" % body.length_bytes
        lines = b"%b %b HTTP/1.1\r\n%b%b%b\r\n" % (
            request.method,
            target,
            self._own_lines(),
            framing,
            b"".join(b"%b: %b\r\n" % item for item in _passing(request.headers, _is_ours)),
        )
        return lines + body.framed(body.held())

    def _own_lines(self) -> bytes:
        request, config = self.request, self.worker.config
        token = "" if config.control is None else config.control.token.get_secret_value()
        host = request.headers.get(b"host", b"")
        control = self._control
        own_host = f"[{control.host}]" if ":" in control.host else control.host
        return (
            f"host: {own_host}:{control.port}\r\nauthorization: Bearer {token}\r\n"
            f"x-headrace-principal: {quote(request.principal, safe='._@-')}\r\n"
            f"x-forwarded-proto: {'http' if config.tls is None else 'https'}\r\n"
        ).encode() + b"x-forwarded-host: %b\r\nx-request-id: %b\r\n" % (host, request.request_id)

    # The response.

    def on_block(self, block: bytes) -> None:
        """Passes on what has come."""
        upstream = self._upstream
        if upstream is None:
            return
        self._last_at = monotonic()
        is_complete = upstream.is_complete or self.request.is_head
        head = b"" if self._has_begun else self._head(upstream)
        payload = b"" if self.request.is_head else b"".join(upstream.parts)
        if self._frames:
            payload = (chunk(payload) if payload else b"") + (LAST_CHUNK if is_complete else b"")
        if written := head + payload:
            self.series.add(metrics.RESPONSE_BYTES, len(written))
            self.client.write(written)
        if is_complete:
            self._settle(upstream.status)
            self.client.exchange_done(abort=False)

    def _head(self, upstream: UpstreamConnection) -> bytes:
        self._has_begun = True
        self._is_waiting = False
        self._close_after_answer()
        self._body.forget()
        request, headers, status = self.request, upstream.headers, upstream.status
        framing = b""
        length = headers.get(b"content-length")
        if length is not None and status != 204:
            framing = b"content-length: %b\r\n" % length
        elif not (request.is_head or status in (204, 304)):
            self._frames = not request.is_http10
            framing = b"transfer-encoding: chunked\r\n" if self._frames else b""
            request.keep_alive = request.keep_alive and self._frames
        return b"%b%b%b%bx-request-id: %b\r\n%b%b\r\n" % (
            answers.status_line(status),
            b"".join(
                b"%b: %b\r\n" % item for item in _passing(headers, _OWN_RESPONSE.__contains__)
            ),
            framing,
            self.worker.date,
            request.request_id,
            answers.connection_line(request),
            request.extra_head,
        )

    def upstream_lost(self) -> None:
        """The control plane closed the connection: the end of the response, or a failure."""
        upstream = self._upstream
        if upstream is None:
            return
        if upstream.status and upstream.is_close_delimited:
            upstream.is_complete = True
            self.on_block(b"")
        elif (
            self._may_retry
            and upstream.is_reused
            and not upstream.status
            and self._body.is_replayable
        ):
            self._may_retry = False
            self._leave()
            self._is_waiting = False
            self.worker.pool.drop(self._control)
            self.worker.pool.connect(self._control, self)
        else:
            self._fail(ControlPlaneUnavailable("The control plane closed the connection."))

    # Failures.

    def connect_failed(self, replica: Replica) -> None:
        """Nobody listens there."""
        self._fail(ControlPlaneUnavailable("The control plane is not reachable now."))

    def upstream_failed(self, error: ServingError) -> None:
        """What came is no response, or the gateway failed."""
        self._fail(ControlPlaneUnavailable("The control plane did not answer in HTTP."))

    def body_failed(self, error: ServingError) -> None:
        """The client will not send the rest, or it is too large."""
        self._fail(error)

    def _fail(self, error: ServingError) -> None:
        if self._is_done:
            return
        self._close_after_answer()
        self._settle(error.status)
        if not self._has_begun:
            answer = answers.error_answer(self.request, error, self.worker.date)
            self.series.add(metrics.RESPONSE_BYTES, len(answer))
            self.client.write(answer)
        self.client.exchange_done(abort=self._has_begun)

    def client_gone(self) -> None:
        """The client left: the control plane's connection is closed."""
        self.series.add(metrics.CLIENT_ABORTS, 1)
        self._settle(metrics.CLIENT_CLOSED)

    def _close_after_answer(self) -> None:
        """What still comes of the body must not be taken for a request."""
        if not self._body.is_complete:
            self.request.keep_alive = False

    def _leave(self) -> None:
        self._body.detach()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            if self.client.is_write_paused:
                upstream.transport.resume_reading()
            upstream.release()

    def _settle(self, status: int) -> None:
        self._is_done = True
        self._leave()
        self._body.close()
        request = self.request
        duration_s = monotonic() - request.received_at
        self.series.settle(status, duration_s, request.body_bytes, 0, 0)
        self.worker.exchanges.discard(self)

    # Flow control and deadlines.

    def heard_from(self, replica: Replica) -> float:
        """Never: it is no replica."""
        return float("-inf")

    def pause(self) -> None:
        """The client reads too slowly."""
        if self._upstream is not None:
            self._upstream.transport.pause_reading()

    def resume(self) -> None:
        """The client has caught up."""
        self._last_at = monotonic()
        if self._upstream is not None:
            self._upstream.transport.resume_reading()

    def check_deadlines(self, now: float) -> None:
        """Ends the exchange if one of its deadlines has passed; the worker's sweep calls it."""
        timeouts, body = self.worker.config.timeouts, self._body
        if self._is_done:
            return
        if body.is_stalled(now, timeouts.idle_s):
            message = f"The control plane took nothing of the request for {timeouts.idle_s:g} s."
        elif self._is_waiting and body.is_overdue(now, self._last_at, timeouts.first_byte_s):
            message = f"The control plane did not answer within {timeouts.first_byte_s:g} s."
        elif self._has_begun and now - self._last_at > timeouts.idle_s:
            message = f"The response stood still for {timeouts.idle_s:g} s."
        elif body.is_complete and now - self.request.received_at > timeouts.total_s:
            message = f"The request took longer than {timeouts.total_s:g} s."
        else:
            return
        self._fail(DeadlineExceeded(message))


def _is_ours(name: bytes) -> bool:
    """Whether a request header is for us to say, also where underscores count as dashes."""
    plain = name.replace(b"_", b"-")
    return plain in _OWN_REQUEST or plain.startswith(_OWN_PREFIXES)


def _passing(
    headers: dict[bytes, bytes], is_own: Callable[[bytes], bool]
) -> list[tuple[bytes, bytes]]:
    """The headers that are meant for the other end."""
    named = {name.strip().lower() for name in headers.get(b"connection", b"").split(b",")}
    return [
        (name, value)
        for name, value in headers.items()
        if name not in _HOP_BY_HOP and name not in named and not is_own(name)
    ]
