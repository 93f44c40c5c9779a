"""One request from its complete body to the end of its response.

The middle of the data plane: resolve the alias, choose a replica, speak its dialect, relay the
response as it comes, settle. A state machine driven by callbacks of the client's and the replica's
connection; it waits for nothing, and its deadlines are kept by the worker's sweep.

Invariants: a replica is charged from its choice until `_leave_replica`; before the first byte to the
client a failure may go to another replica; after it there is no second response.
"""

from __future__ import annotations

from enum import IntEnum
from time import monotonic
from typing import TYPE_CHECKING

from serving.errors import (
    BadRequest,
    DeadlineExceeded,
    NoReplica,
    NotOffered,
    ServingError,
    UnknownModel,
    UpstreamBroken,
)
from serving.gateway import answers, metrics
from serving.gateway.request import read_body_fields
from serving.gateway.streaming import EventRelay
from serving.gateway.sse import CHUNKED_EVENT_END, ERROR_MARK, LAST_CHUNK, USAGE_MARK, chunk
from serving.gateway.usage import Usage, find_usage
from serving.routing.cost import estimate_tokens

if TYPE_CHECKING:
    from serving.gateway.client import ClientConnection
    from serving.gateway.request import BodyFields, Request
    from serving.gateway.upstream import UpstreamConnection
    from serving.gateway.worker import Worker
    from serving.routing.snapshot import Model, Replica

_MAX_ERROR_BODY_BYTES = 65_536
_MAX_SENT_ATTEMPTS = 2
"""A request that was sent and killed its connection is tried once more only: were it the request
that kills engines, it would otherwise take the fleet down."""
_USAGE_TAIL_BYTES = 2048
_EVENT_STREAM = b"text/event-stream"
_TRACE_HEADERS = (b"traceparent", b"tracestate")


class Phase(IntEnum):
    """How far a request has come."""

    CHOOSING = 0
    CONNECTING = 1
    WAITING = 2  # sent; nothing of the response has been relayed
    RELAYING = 3  # the first byte is out
    DONE = 4


class Exchange:
    """A request, the replica that works on it, and what has been relayed so far."""

    __slots__ = (
        "_attempts",
        "_client",
        "_client_write",
        "_cost_tokens",
        "_events",
        "_excluded",
        "_fields",
        "_frames",
        "_is_fast",
        "_last_at",
        "_model",
        "_num_events",
        "_num_sent",
        "_payload",
        "_phase_since",
        "_replica",
        "_series",
        "_tail",
        "_upstream",
        "_usage",
        "_worker",
        "phase",
        "request",
    )

    def __init__(self, worker: Worker, client: ClientConnection, request: Request) -> None:
        self._worker = worker
        self._client = client
        self.request = request
        self.phase = Phase.CHOOSING
        self._fields: BodyFields
        self._model: Model
        self._series: metrics.Series
        self._replica: Replica | None = None
        self._upstream: UpstreamConnection | None = None
        self._excluded: tuple[int, ...] = ()
        self._attempts = 0
        self._num_sent = 0
        self._cost_tokens = 0
        self._payload = b""
        self._usage: Usage | None = None
        self._events: EventRelay | None = None
        self._is_fast = False
        self._num_events = 0
        self._tail = b""
        self._frames = False
        self._phase_since = self._last_at = request.received_at

    # The way in: resolve → choose → send.

    def start(self) -> None:
        """Resolves the model and makes the first attempt."""
        try:
            self._resolve()
        except ServingError as error:
            self._series = self._worker.metrics.of((self._endpoint_path, "", ""))
            self._series.add(metrics.IN_FLIGHT, 1)
            self._answer_error(error)
            return
        self._series = self._worker.metrics.of((self._endpoint_path, self._model.name, ""))
        self._series.add(metrics.IN_FLIGHT, 1)
        self._attempt(None)

    @property
    def _endpoint_path(self) -> str:
        endpoint = self.request.endpoint
        return "" if endpoint is None else endpoint.path

    def _resolve(self) -> None:
        request = self.request
        body = request.body()
        fields = self._fields = read_body_fields(body)
        self._model = self._find_model(fields.model)
        if self._endpoint_path not in self._model.offered:
            raise NotOffered(
                f"The engine that serves '{self._model.name}' does not offer {self._endpoint_path}."
            )
        bound = fields.max_completion_tokens or fields.max_tokens or fields.max_output_tokens
        self._cost_tokens = estimate_tokens(len(body), bound, fields.n or 1)

    def _find_model(self, name: str | None) -> Model:
        snapshot = self._worker.snapshot
        if name is None:
            endpoint = self.request.endpoint
            if endpoint is not None and endpoint.model_optional and snapshot.default_model:
                return snapshot.default_model
            raise BadRequest("You must provide a 'model' parameter.", param="model")
        model = snapshot.models.get(name)
        if model is not None:
            return model
        if not snapshot.is_complete:
            raise NoReplica(
                f"No reachable replica serves '{name[:200]}' yet; some have not been reached."
            )
        raise UnknownModel(
            f"The model '{name[:200]}' does not exist. GET /v1/models lists the ones that do.",
            param="model",
        )

    def _attempt(self, cause: ServingError | None) -> None:
        """Chooses a replica and sends; with none left, answers with what the last one did."""
        worker = self._worker
        # Read again for each attempt: the fleet may have changed since the last one.
        model = worker.snapshot.models.get(self._model.name, self._model)
        candidates = model.healthy.get(self._endpoint_path, ())
        if self._excluded:
            candidates = tuple(r for r in candidates if r.index not in self._excluded)
        if not candidates:
            none_left = NoReplica(f"No replica of '{model.name}' can take a request now.")
            self._answer_error(cause or none_left)
            return
        loads = worker.ledger.outstanding_tokens(candidates)
        replica = candidates[worker.policy(loads, worker.next_rotation())]
        self._enter_replica(replica)
        connection = worker.pool.take(replica)
        if connection is None:
            self.phase = Phase.CONNECTING
            worker.pool.connect(replica, self)
        else:
            self._send(connection)

    def _enter_replica(self, replica: Replica) -> None:
        self._attempts += 1
        self._replica = replica
        self._worker.ledger.charge(replica.index, self._cost_tokens)
        self._series.add(metrics.IN_FLIGHT, -1)
        self._series = self._worker.metrics.of(
            (self._endpoint_path, self._model.name, replica.name)
        )
        self._series.add(metrics.IN_FLIGHT, 1)

    def _leave_replica(self) -> None:
        """Settles the charge and parts with the connection."""
        replica, self._replica = self._replica, None
        if replica is not None:
            self._worker.ledger.settle(replica.index, self._cost_tokens)
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            if self._client.is_write_paused:
                upstream.transport.resume_reading()
            upstream.release()

    def _send(self, connection: UpstreamConnection) -> None:
        self._upstream = connection
        self.phase = Phase.WAITING
        self._phase_since = monotonic()
        self._num_sent += 1
        connection.begin(self, self._engine_request(connection.replica))

    def _engine_request(self, replica: Replica) -> bytes:
        """Head and body for the engine: of the client's headers only its trace context passes."""
        request = self.request
        body = self._engine_body(replica)
        trace = b""
        for name in _TRACE_HEADERS:
            value = request.headers.get(name)
            if value is not None:
                trace += b"%b: %b\r\n" % (name, value)
        return b"%b%b\r\n%bcontent-length: %d\r\n\r\n%b" % (
            self._worker.request_prefix(replica, self._endpoint_path),
            request.inference_id,
            trace,
            len(body),
            body,
        )

    def _engine_body(self, replica: Replica) -> bytes:
        """The body in the engine's terms; rewritten at the first attempt only."""
        if self._payload:
            return self._payload
        model, fields = self._model, self._fields
        engine_name = None if model.engine_name == fields.model else model.engine_name
        add_usage = self._adds_usage
        body = self.request.body()
        if engine_name is not None or add_usage:
            body = replica.dialect.rewrite_body(body, engine_name, add_usage=add_usage)
        self._payload = body
        return body

    @property
    def _adds_usage(self) -> bool:
        """Whether we ask for a stream's usage, and withhold it, because the client did not ask."""
        fields, endpoint = self._fields, self.request.endpoint
        if not fields.stream or endpoint is None or not endpoint.injects_usage:
            return False
        return fields.stream_options is None or not fields.stream_options.include_usage

    # What the pool and the connection to the replica report.

    def connected(self, connection: UpstreamConnection) -> None:
        """The connection that was asked for is open; a request that has ended returns it."""
        if self.phase is Phase.CONNECTING and self._replica is connection.replica:
            self._send(connection)
        else:
            self._worker.pool.give_back(connection)

    def connect_failed(self, replica: Replica) -> None:
        """The replica does not accept connections: it is down for everybody until a probe succeeds."""
        self._worker.registry.report_down(replica)
        if self.phase is Phase.CONNECTING and self._replica is replica:
            self._retry(NoReplica(f"The replica of '{self._model.name}' is not reachable."))

    def upstream_lost(self) -> None:
        """The replica closed the connection."""
        upstream = self._upstream
        if upstream is None:
            return
        if self.phase is Phase.RELAYING and upstream.is_close_delimited:
            upstream.is_complete = True
            self._relay(b"")
            return
        if self.phase is Phase.WAITING and upstream.is_reused and not upstream.status:
            # It was closing while we wrote. The replica itself may be well: same one, new connection.
            self._retry_on_fresh_connection(upstream.replica)
            return
        self._worker.registry.probe_soon()
        self.upstream_failed(UpstreamBroken("The engine closed the connection while it answered."))

    def _retry_on_fresh_connection(self, replica: Replica) -> None:
        self._worker.pool.drop(replica)
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.release()
        self.phase = Phase.CONNECTING
        self._worker.pool.connect(replica, self)

    def upstream_failed(self, error: ServingError) -> None:
        """The attempt is lost: tried elsewhere before the first byte, told to the client after it."""
        if self.phase is Phase.RELAYING:
            self._break_off(error)
        elif self.phase is not Phase.DONE:
            if self._num_sent >= _MAX_SENT_ATTEMPTS:
                self._answer_error(error)
            else:
                self._retry(error)

    def _retry(self, error: ServingError) -> None:
        if self._replica is not None:
            self._excluded += (self._replica.index,)
        self._leave_replica()
        if self._attempts >= self._worker.config.limits.max_attempts:
            self._answer_error(error)
            return
        self._series.add(metrics.RETRIES, 1)
        self.phase = Phase.CHOOSING
        self._attempt(error)

    # The response.

    def on_block(self, block: bytes) -> None:
        """The next bytes of the response, as they came; the connection holds them dechunked."""
        upstream = self._upstream
        if (
            self._is_fast
            and block.endswith(CHUNKED_EVENT_END)
            and USAGE_MARK not in block
            and ERROR_MARK not in block
            and upstream is not None
            and not upstream.is_complete
        ):
            # Whole events in whole chunks: they pass as they are.
            self._client_write(block)
            series = self._series
            now = monotonic()
            series.observe_itl(now - self._last_at)
            self._last_at = now
            self._num_events += 1
            series.values[series.base + metrics.RESPONSE_BYTES] += len(block)
        elif self.phase is Phase.RELAYING:
            self._relay(block)
        elif upstream is not None:
            self._on_first_block(upstream)

    def _on_first_block(self, upstream: UpstreamConnection) -> None:
        """Decides by the response's head what becomes of it.

        A stream's head is held until its first event, so that an engine that dies before is still
        a failure before the first byte.
        """
        if upstream.status >= 300:
            self._collect_error(upstream)
            return
        content_type = upstream.headers.get(b"content-type", answers.JSON)
        if content_type.startswith(_EVENT_STREAM):
            if upstream.parts or upstream.is_complete:
                self._begin_stream(upstream, content_type)
            return
        self._begin_body(upstream, content_type)

    def _collect_error(self, upstream: UpstreamConnection) -> None:
        """Holds an engine's error until it is complete: it never passes as it is."""
        self._tail += b"".join(upstream.parts)
        if not upstream.is_complete and len(self._tail) < _MAX_ERROR_BODY_BYTES:
            return
        body, self._tail = self._tail, b""
        error = upstream.replica.dialect.to_error(upstream.status, body, self._model.name)
        if error.retryable:
            self.upstream_failed(error)
        else:
            self._answer_error(error)

    def _begin_stream(self, upstream: UpstreamConnection, content_type: bytes) -> None:
        now = monotonic()
        self._series.observe_ttft(now - self.request.received_at)
        self._last_at = now
        self._events = EventRelay(
            withholds_usage=self._adds_usage,
            error_shape=self.request.error_shape,
            request_id=self.request.request_id.decode(),
            dialect=upstream.replica.dialect,
            model=self._model.name,
        )
        framing = b"cache-control: no-cache\r\n" + self._chunked_framing()
        head = self._commit(upstream, content_type, framing)
        self._relay_events(upstream, head)

    def _begin_body(self, upstream: UpstreamConnection, content_type: bytes) -> None:
        length = upstream.headers.get(b"content-length")
        framing = self._chunked_framing() if length is None else b"content-length: %b\r\n" % length
        head = self._commit(upstream, content_type, framing)
        self._relay_body(upstream, head)

    def _chunked_framing(self) -> bytes:
        """Framing for a body of unknown length; HTTP/1.0 clients get one that ends with the connection."""
        if self.request.is_http10:
            self.request.keep_alive = False
            return b""
        self._frames = True
        return b"transfer-encoding: chunked\r\n"

    def _commit(self, upstream: UpstreamConnection, content_type: bytes, framing: bytes) -> bytes:
        """From here on there is no other answer. Returns the head, not yet written."""
        self.phase = Phase.RELAYING
        self._client_write = self._client.write
        self._payload = b""
        self.request.body_parts = []
        return answers.head(self.request, upstream.status, content_type, framing, self._worker.date)

    def _relay(self, block: bytes) -> None:
        """The slow path of `on_block`: bodies, and blocks that need a look or a new framing."""
        upstream = self._upstream
        if upstream is None:
            return
        if self._events is None:
            self._relay_body(upstream, b"")
            return
        now = monotonic()
        self._series.observe_itl(now - self._last_at)
        self._relay_events(upstream, b"")

    def _relay_body(self, upstream: UpstreamConnection, head: bytes) -> None:
        self._last_at = monotonic()
        body = b"".join(upstream.parts)
        self._tail = (self._tail + body)[-_USAGE_TAIL_BYTES:]
        framed = chunk(body) if self._frames and body else body
        if upstream.is_complete and self._frames:
            framed += LAST_CHUNK
        self._write(head + framed)
        if upstream.is_complete:
            self._usage = find_usage(self._tail)
            self._finish(upstream.status)

    def _relay_events(self, upstream: UpstreamConnection, head: bytes) -> None:
        events = self._events
        if events is None:
            return
        self._last_at = monotonic()
        try:
            payload = events.feed(upstream.parts, is_last=upstream.is_complete)
        except ServingError as error:
            self._break_off(error)
            return
        self._num_events += events.num_relayed
        framed = chunk(payload) if self._frames and payload else payload
        if upstream.is_complete:
            self._usage = events.usage
            self._write(head + framed + (LAST_CHUNK if self._frames else b""))
            self._finish(upstream.status)
            return
        # Between whole events, chunks from the engine may pass as they are.
        self._is_fast = (
            self._frames and events.is_between_events and b"transfer-encoding" in upstream.headers
        )
        if head or framed:
            self._write(head + framed)

    def _write(self, payload: bytes) -> None:
        self._series.add(metrics.RESPONSE_BYTES, len(payload))
        self._client.write(payload)

    def _break_off(self, error: ServingError) -> None:
        """Ends a response that cannot be completed, so that its client cannot take it for whole."""
        request = self.request
        request.keep_alive = False
        if self._events is not None and self._frames:
            shape, request_id = request.error_shape, request.request_id.decode()
            last = chunk(answers.error_event(error, shape, request_id))
            self._write(last + LAST_CHUNK)
            self._finish(error.status)
            return
        self._finish(error.status, abort_client=True)

    # The way out.

    def _answer_error(self, error: ServingError) -> None:
        self._leave_replica()
        self._write(answers.error_answer(self.request, error, self._worker.date))
        self._finish(error.status)

    def _finish(self, status: int, *, abort_client: bool = False) -> None:
        """Settles and hands the client connection on to its next request."""
        self._settle(status)
        self._client.exchange_done(abort=abort_client)

    def _settle(self, status: int) -> None:
        self.phase = Phase.DONE
        self._is_fast = False
        self._leave_replica()
        request, series = self.request, self._series
        series.add(metrics.IN_FLIGHT, -1)
        series.add(metrics.REQUEST_BYTES, request.body_bytes)
        if self._usage is None and self._events is not None:
            self._usage = self._events.usage
        if self._usage is not None:
            series.add(metrics.PROMPT_TOKENS, self._usage.prompt_tokens)
            series.add(metrics.COMPLETION_TOKENS, self._usage.completion_tokens)
        elif self._num_events:
            # Cut off before its usage: engines send one token an event, but for the first.
            series.add(metrics.COMPLETION_TOKENS, self._num_events)
        series.finish(status, monotonic() - request.received_at)
        self._worker.exchanges.discard(self)

    def client_gone(self) -> None:
        """The client left: the replica's connection is closed, which makes engines stop generating."""
        if self.phase is not Phase.DONE:
            self._series.add(metrics.CLIENT_ABORTS, 1)
            self._settle(metrics.CLIENT_CLOSED)

    # Flow control and deadlines.

    def pause(self) -> None:
        """The client reads too slowly: its replica is not read either until it has caught up."""
        if self._upstream is not None:
            self._upstream.transport.pause_reading()

    def resume(self) -> None:
        """The client has caught up."""
        if self._upstream is not None:
            self._upstream.transport.resume_reading()
        self._last_at = monotonic()

    def check_deadlines(self, now: float) -> None:
        """Ends the exchange if one of its deadlines has passed; the worker's sweep calls it."""
        timeouts = self._worker.config.timeouts
        waited = now - self.request.received_at
        if waited > timeouts.total_s:
            self._expire(f"The request took longer than {timeouts.total_s:g} s.")
        elif self.phase is Phase.WAITING and now - self._phase_since > timeouts.first_byte_s:
            self._expire(f"The engine did not answer within {timeouts.first_byte_s:g} s.")
        elif self.phase is Phase.RELAYING and now - self._last_at > timeouts.idle_s:
            self._expire(f"The response stood still for {timeouts.idle_s:g} s.")

    def _expire(self, message: str) -> None:
        error = DeadlineExceeded(message)
        if self.phase is not Phase.RELAYING:
            self._answer_error(error)
        elif self._client.is_write_paused:
            # It is the client that does not read: an error event would only join the queue.
            self.request.keep_alive = False
            self._finish(error.status, abort_client=True)
        else:
            self._break_off(error)
