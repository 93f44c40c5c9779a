"""One request from its route to the end of its response.

The middle of the data plane: choose a replica, send in its dialect, hand the response to a relay,
settle. A state machine driven by callbacks of the client's and the replica's connection; it waits
for nothing, and its deadlines are kept by the worker's sweep.

Invariants: a replica is charged from its choice until it is left (`exchange_accounts.py`); before the first byte to the
client a failure may go to another replica; after it there is no second response.
"""

from __future__ import annotations

from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from serving.errors import (
    AdapterMissing,
    DeadlineExceeded,
    NoReplica,
    Overloaded,
    ServingError,
    UpstreamLost,
)
from serving.gateway import answers, metrics
from serving.gateway.engine_request import client_trace_lines, engine_call
from serving.gateway.exchange_accounts import ExchangeAccounts, Phase
from serving.gateway.first_bytes import judge
from serving.gateway.relay import BodyRelay, StreamRelay

if TYPE_CHECKING:
    from serving.engines.base import EngineCall
    from serving.gateway.client import ClientConnection
    from serving.gateway.first_bytes import Verdict
    from serving.gateway.request import Request
    from serving.gateway.resolve import Route
    from serving.gateway.upstream import UpstreamConnection
    from serving.gateway.worker import Worker
    from serving.routing.snapshot import Replica

__all__ = ["Exchange", "Phase"]

_GONE = (AdapterMissing, NoReplica, UpstreamLost)
"""Failures of a replica that does not have the adapter any more, or is no more itself."""
_MAX_SENDS = 2
"""A request that was sent and killed its connection is sent once more only: were it the request that
kills engines, it would otherwise take the fleet down."""


class Exchange(ExchangeAccounts):
    """A request, the replica that works on it, and the relay of its response."""

    __slots__ = (
        "_call",
        "_excluded",
        "_held",
        "_num_attempts",
        "_num_sends",
        "_overload",
        "_sent_at",
    )

    def __init__(
        self, worker: Worker, client: ClientConnection, request: Request, route: Route
    ) -> None:
        # The accounts' own fields are set here too: a call less for each request.
        self.worker = worker
        self.client = client
        self.request = request
        self.span = None
        self._route = route
        self._phase = Phase.CHOOSING
        self._replica = None
        self._upstream = None
        self._relay = None
        self._is_counted = False
        self._excluded: tuple[int, ...] = ()
        self._num_attempts = 0
        self._num_sends = 0
        self._overload: Overloaded | None = None
        self._call: EngineCall | None = None
        self._held = b""
        self._sent_at = 0.0

    def start(self) -> None:
        """Makes the first attempt."""
        if self.worker.tracer is not None:
            self.span = self.worker.tracer.begin(self.request, self._route)
        self._attempt(None)

    # The way in: choose → connect → send.

    def _attempt(self, cause: ServingError | None) -> None:
        """Chooses a replica and sends."""
        worker, route = self.worker, self._route
        candidates = self._candidates()
        if not candidates:
            self._without_candidates(cause)
            return
        if cause is None:
            worker.retry_budget.deposit()
        else:
            self.series.add(metrics.RETRIES, 1)
        self._num_attempts += 1
        self._renew_adapter()
        self._replica = replica = worker.choose(candidates, route.cost_tokens, route.model.adapter)
        self._count_under(replica.name)
        if self.span is not None:
            self.span.begin_attempt(replica)
        connection = worker.pool.take(replica)
        if connection is None:
            self._phase = Phase.CONNECTING
            worker.pool.connect(replica, self)
        else:
            self._send(connection)

    def _candidates(self) -> tuple[Replica, ...]:
        """Replicas to choose from, by the newest snapshot: the fleet may have changed meanwhile.

        By the version and not by its alias, which may mean another one by now.
        """
        route, snapshot = self._route, self.worker.snapshot
        model = route.model
        if model.adapter is None:
            newest = snapshot.models.get(model.version, model)
        else:
            newest = snapshot.find(model.version) or model
        healthy = newest.healthy.get(route.endpoint.path, ())
        if route.kept_by is not None:
            # Another could only say that it does not know the response; let it, if the keeper is gone.
            healthy = tuple(one for one in healthy if one.index == route.kept_by) or healthy
        if not self._excluded:
            return healthy
        return tuple(replica for replica in healthy if replica.index not in self._excluded)

    def _renew_adapter(self) -> None:
        """The adapter's names and folders on the replicas, which may be known since the choice only."""
        model = self._route.model
        newest = None if model.adapter is None else self.worker.snapshot.find(model.version)
        if newest is not None and newest.adapter is not model.adapter:
            found = replace(model, adapter=newest.adapter, engine_names=newest.engine_names)
            self._route = self._route._replace(model=found)

    def _without_candidates(self, cause: ServingError | None) -> None:
        """Answers with what the last replica did; a published adapter is waited for instead.

        Also where the only replica that had it is gone: the control plane loads it on another. A replica
        that is full or fails the request has the adapter: there is nothing to wait for.
        """
        model = self._route.model
        if not self._is_counted:
            self._count_under("")
        if model.adapter is not None and (cause is None or isinstance(cause, _GONE)):
            newest = self.worker.snapshot.find(model.name)
            if newest is not None and newest.version != model.version:
                # The alias means another version by now, and nothing has been said for the old one.
                self._route = self._route._replace(model=newest)
                self._attempt(cause)
                return
            cause = self.worker.cold_starts.enter(self, model)
            if cause is None:
                return
        self._answer_error(
            cause or NoReplica(f"No replica of '{model.name}' can take a request now.")
        )

    def choose_again(self, error: ServingError | None = None) -> None:
        """The adapter that was waited for is ready; or it is not, and why."""
        if error is None:
            self._excluded = ()
            self._attempt(None)
        else:
            self._answer_error(error)

    def _send(self, connection: UpstreamConnection) -> None:
        try:
            payload = self._engine_request(connection.replica)
        except ServingError as error:
            self.worker.pool.give_back(connection)
            self._answer_error(error)
            return
        self._upstream = connection
        self._phase = Phase.WAITING
        self._sent_at = monotonic()
        self._num_sends += 1
        connection.begin(self, payload)

    def _engine_request(self, replica: Replica) -> bytes:
        request, route = self.request, self._route
        self._call = call = engine_call(request, route, replica)
        trace = client_trace_lines(request) if self.span is None else self.span.trace_lines()
        return self.worker.engine_requests.build(request, route, call, replica, trace)

    def connected(self, connection: UpstreamConnection) -> None:
        """The connection that was asked for is open; one that nobody waits for any more is kept."""
        if self._phase is Phase.CONNECTING and self._replica is connection.replica:
            self._send(connection)
        else:
            self.worker.pool.give_back(connection)

    # The response, until its first byte goes out.

    def on_block(self, block: bytes) -> None:
        """Decides by the response's head and first bytes what becomes of it (`first_bytes.py`)."""
        upstream, call = self._upstream, self._call
        if upstream is None or call is None:
            return
        parts = upstream.parts
        came = parts[0] if len(parts) == 1 else b"".join(parts)
        self._held = self._held + came if self._held else came
        verdict = judge(upstream, self._held, call, self._route.model.name)
        if verdict is None:
            return
        if verdict.error is not None:
            self._fail(verdict.error)
        else:
            self._begin(upstream, call, verdict, block)

    def _begin(
        self, upstream: UpstreamConnection, call: EngineCall, verdict: Verdict, block: bytes
    ) -> None:
        """The first byte goes out. What a retry would have needed is not needed any more."""
        relay: BodyRelay | StreamRelay
        if verdict.kind == "stream":
            relay = StreamRelay(self, upstream, call)
        else:
            relay = BodyRelay(self, upstream)
            if upstream.is_complete:
                upstream.headers[b"content-length"] = b"%d" % len(verdict.first)
        if self.span is not None:
            self.span.first_byte()
        self._phase = Phase.RELAYING
        self._relay = upstream.reader = relay
        self._held = b""
        self.request.body_parts = []
        relay.begin(verdict.first, block)

    def _fail(self, error: ServingError) -> None:
        if error.retryable:
            self.upstream_failed(error)
            return
        if self._replica is not None:
            # A refusal is an answer of an engine that works.
            self.worker.registry.report_success(self._replica)
        self._answer_error(error)

    # Failures before the first byte.

    def connect_failed(self, replica: Replica) -> None:
        """The replica takes no connections: it is down for everybody until a probe succeeds."""
        self.worker.registry.report_down(replica)
        if self._phase is Phase.CONNECTING and self._replica is replica:
            self._retry(NoReplica(f"The replica of '{self._route.model.name}' is not reachable."))

    def upstream_lost(self) -> None:
        """The replica closed the connection instead of answering."""
        upstream = self._upstream
        if upstream is None:
            return
        may_send = self._num_sends < _MAX_SENDS
        is_stale = upstream.is_reused and not upstream.status and may_send
        others = [r for r in self._candidates() if r is not upstream.replica]
        if is_stale and not others:
            # It was closing while we wrote. The replica may be well: same one, new connection.
            # Only where there is no other: a replica that is being killed still accepts one. Counted as
            # one send, since it harms no second replica.
            self._num_sends -= 1
            self._upstream = None
            self.worker.pool.drop(upstream.replica)
            self._phase = Phase.CONNECTING
            self.worker.pool.connect(upstream.replica, self)
        elif upstream.status and upstream.is_close_delimited:
            upstream.is_complete = True
            self.on_block(b"")
        else:
            self.upstream_failed(UpstreamLost("The engine closed the connection unanswered."))

    def report_broken(self) -> None:
        """The replica failed this request: counts against it."""
        if self._replica is not None:
            self.worker.registry.report_failure(self._replica)

    def upstream_failed(self, error: ServingError) -> None:
        """The attempt is lost: tried elsewhere, within bounds."""
        if isinstance(error, (Overloaded, AdapterMissing)):
            # A full queue is no fault, and what it refuses it has not begun to work on.
            self._num_sends -= 1
            if isinstance(error, Overloaded):
                self._overload = error
            elif self._replica is not None:
                self.worker.registry.report_missing(self._replica, self._route.model.version)
        else:
            self.report_broken()
        if self._num_sends < _MAX_SENDS:
            self._retry(error)
        else:
            self._answer_error(error)

    def _retry(self, error: ServingError) -> None:
        if self._replica is not None:
            self._excluded += (self._replica.index,)
        if self.span is not None:
            self.span.attempt_failed(error)
        self._leave_replica()
        worker = self.worker
        if self._num_attempts >= worker.config.limits.max_attempts or not (
            worker.retry_budget.withdraw(monotonic())
        ):
            self._answer_error(error)
            return
        self._phase = Phase.CHOOSING
        self._held = b""
        self._attempt(error)

    # The way out.

    def complete(self, error: ServingError | None = None) -> None:
        """The relay has written the last byte of the response.

        Args:
            error: What the engine reported in the middle of its stream, if it did.
        """
        status = 200 if self._upstream is None else self._upstream.status
        if error is not None:
            status = error.status
            self.report_broken()
        elif self._replica is not None:
            self.worker.registry.report_success(self._replica)
        self._settle(status)
        self.client.exchange_done(abort=False)

    def break_off(self, error: ServingError) -> None:
        """Ends a response that cannot be completed, so that its client cannot take it for whole."""
        self.request.keep_alive = False
        told = self._relay is not None and self._relay.break_off(error)
        self._settle(error.status)
        self.client.exchange_done(abort=not told)

    def _answer_error(self, error: ServingError) -> None:
        if self._overload is not None and isinstance(error, NoReplica):
            # That a replica is full says more than that another was not reached.
            error = self._overload
        answer = answers.error_answer(self.request, error, self.worker.date)
        self.series.add(metrics.RESPONSE_BYTES, len(answer))
        self._settle(error.status)
        self.client.write(answer)
        self.client.exchange_done(abort=False)

    def client_gone(self) -> None:
        """The client left: the replica's connection is closed, which makes engines stop generating."""
        self.series.add(metrics.CLIENT_ABORTS, 1)
        self._settle(metrics.CLIENT_CLOSED)

    def heard_from(self, replica: Replica) -> float:
        """When bytes of the response last came from this replica; long ago if it is another's."""
        if self._relay is None or self._replica is not replica:
            return float("-inf")
        return self._relay.last_at

    # Flow control and deadlines.

    def pause(self) -> None:
        """The client reads too slowly: its replica is not read either until it has caught up."""
        if self._upstream is not None:
            self._upstream.transport.pause_reading()

    def resume(self) -> None:
        """The client has caught up."""
        if self._upstream is not None:
            self._upstream.transport.resume_reading()
        if self._relay is not None:
            self._relay.last_at = monotonic()

    def check_deadlines(self, now: float) -> None:
        """Ends the exchange if one of its deadlines has passed; the worker's sweep calls it."""
        timeouts = self.worker.config.timeouts
        if self._phase is Phase.DONE:
            return
        if now - self.request.received_at > timeouts.total_s:
            self._expire(f"The request took longer than {timeouts.total_s:g} s.")
        elif self._relay is not None:
            if now - self._relay.last_at > timeouts.idle_s:
                if not self.client.is_write_paused:
                    self.report_broken()
                self._expire(f"The response stood still for {timeouts.idle_s:g} s.")
        elif self._phase is Phase.WAITING and now - self._sent_at > timeouts.first_byte_s:
            self.report_broken()
            self._expire(f"The engine did not answer within {timeouts.first_byte_s:g} s.")

    def _expire(self, message: str) -> None:
        error = DeadlineExceeded(message)
        if self._relay is None:
            self._answer_error(error)
        elif self.client.is_write_paused:
            # It is the client that does not read: an error event would only join the queue.
            self._settle(error.status)
            self.client.exchange_done(abort=True)
        else:
            self.break_off(error)
