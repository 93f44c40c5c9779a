"""A form on its way to a replica: an exchange whose request is sent while it comes.

What differs from `exchange.py`: a retry is possible only while all that was sent is still held, the
deadline of the first byte counts from the end of the body, and an engine may answer before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import UpstreamBroken
from serving.gateway.engine_request import client_trace_lines, engine_call
from serving.gateway.exchange import Exchange, Phase

if TYPE_CHECKING:
    from serving.engines.base import EngineCall
    from serving.errors import ServingError
    from serving.gateway.client import ClientConnection
    from serving.gateway.first_bytes import Verdict
    from serving.gateway.form_body import FormBody
    from serving.gateway.request import Request
    from serving.gateway.resolve import Route
    from serving.gateway.upstream import UpstreamConnection
    from serving.gateway.worker import Worker
    from serving.routing.snapshot import Replica


class FormExchange(Exchange):
    """A form, the replica that works on it, and the relay of both bodies."""

    __slots__ = ("_body",)

    def __init__(
        self,
        worker: Worker,
        client: ClientConnection,
        request: Request,
        route: Route,
        body: FormBody,
    ) -> None:
        super().__init__(worker, client, request, route)
        self._body = body
        body.relayer = self

    def body_failed(self, error: ServingError) -> None:
        """The client will not send the rest, or it cannot be relayed."""
        if self._phase is Phase.RELAYING:
            self.break_off(error)
        else:
            self._answer_error(error)

    # The way in.

    def _send(self, connection: UpstreamConnection) -> None:
        super()._send(connection)
        if self._upstream is connection:
            self._body.flow_to(connection)

    def _engine_request(self, replica: Replica) -> bytes:
        request = self.request
        self._call = call = engine_call(request, self._route, replica)
        trace = client_trace_lines(request) if self.span is None else self.span.trace_lines()
        return self.worker.engine_requests.build_form(request, self._body, call, replica, trace)

    # The answer, perhaps before the request has ended.

    def _begin(
        self, upstream: UpstreamConnection, call: EngineCall, verdict: Verdict, block: bytes
    ) -> None:
        self._close_after_answer()
        self._body.forget()
        super()._begin(upstream, call, verdict, block)

    def _answer_error(self, error: ServingError) -> None:
        self._close_after_answer()
        super()._answer_error(error)

    def _close_after_answer(self) -> None:
        """What still comes of the body must not be taken for a request."""
        if not self._body.is_complete:
            self.request.keep_alive = False

    # Failures.

    def upstream_lost(self) -> None:
        """The replica closed the connection; what went beyond the held prefix is not sent twice."""
        upstream = self._upstream
        if upstream is not None and not upstream.status and not self._body.is_replayable:
            self.upstream_failed(
                UpstreamBroken("The engine closed the connection in the middle of the upload.")
            )
            return
        if upstream is not None and not upstream.status:
            self._body.detach()
        super().upstream_lost()

    def _retry(self, error: ServingError) -> None:
        if self._body.is_replayable:
            super()._retry(error)
        else:
            self._answer_error(error)

    def _leave_replica(self) -> None:
        self._body.detach()
        super()._leave_replica()

    def _settle(self, status: int) -> None:
        self._close_after_answer()
        # The connection goes first: it asks the body whether it was sent whole.
        super()._settle(status)
        self._body.close()

    # Deadlines.

    def check_deadlines(self, now: float) -> None:
        """Ends the exchange if one of its deadlines has passed; the worker's sweep calls it."""
        timeouts, body = self.worker.config.timeouts, self._body
        if self._phase is not Phase.WAITING:
            super().check_deadlines(now)
        elif body.is_stalled(now, timeouts.idle_s):
            self.report_broken()
            self._expire(f"The engine took nothing of the request for {timeouts.idle_s:g} s.")
        elif body.is_overdue(now, self._sent_at, timeouts.first_byte_s):
            self.report_broken()
            self._expire(f"The engine did not answer within {timeouts.first_byte_s:g} s.")
        elif body.is_complete and now - self.request.received_at > timeouts.total_s:
            self._expire(f"The request took longer than {timeouts.total_s:g} s.")
