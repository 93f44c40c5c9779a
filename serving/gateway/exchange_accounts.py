"""What an exchange is counted and charged under, from its first attempt to its settlement.

Base of `exchange.py`'s state machine: owns the series, the charge of the replica and the release of its
connection. Never decides anything.
"""

from __future__ import annotations

from enum import IntEnum
from time import monotonic
from typing import TYPE_CHECKING

from serving.gateway import metrics

if TYPE_CHECKING:
    from serving.gateway.client import ClientConnection
    from serving.gateway.relay import Relay
    from serving.gateway.request import Request
    from serving.gateway.resolve import Route
    from serving.gateway.upstream import UpstreamConnection
    from serving.gateway.worker import Worker
    from serving.routing.snapshot import Replica
    from serving.tracing.tracer import RequestSpan


class Phase(IntEnum):
    """How far a request has come."""

    CHOOSING = 0
    CONNECTING = 1
    WAITING = 2  # sent; nothing of the response has been relayed
    RELAYING = 3  # the first byte is out
    DONE = 4


class ExchangeAccounts:
    """The accounts of one request.

    Attributes:
        series: What it is counted under; names the replica once one is chosen.
    """

    __slots__ = (
        "_is_counted",
        "_phase",
        "_relay",
        "_replica",
        "_route",
        "_upstream",
        "client",
        "request",
        "series",
        "span",
        "worker",
    )

    worker: Worker
    client: ClientConnection
    request: Request
    series: metrics.Series
    span: RequestSpan | None
    _route: Route
    _phase: Phase
    _replica: Replica | None
    _upstream: UpstreamConnection | None
    _relay: Relay | None
    _is_counted: bool

    def _count_under(self, replica_name: str) -> None:
        if self._is_counted:
            self.series.add(metrics.IN_FLIGHT, -1)
        self._is_counted = True
        route = self._route
        self.series = self.worker.metrics.of((route.endpoint.path, route.model.label, replica_name))
        self.series.add(metrics.IN_FLIGHT, 1)

    def _leave_replica(self) -> None:
        """Settles the charge and parts with the connection."""
        replica, self._replica = self._replica, None
        if replica is not None:
            self.worker.ledger.settle(replica.index, self._route.cost_tokens)
        else:
            self.worker.cold_starts.leave(self)
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            if self.client.is_write_paused:
                upstream.transport.resume_reading()
            upstream.release()

    def _settle(self, status: int) -> None:
        self._phase = Phase.DONE
        self._leave_replica()
        request, relay = self.request, self._relay
        prompt_tokens, completion_tokens = (0, 0) if relay is None else relay.counted_tokens()
        duration_s = monotonic() - request.received_at
        self.series.settle(status, duration_s, request.body_bytes, prompt_tokens, completion_tokens)
        if self._route.model.adapter is not None:
            self._count_adapter(status, prompt_tokens, completion_tokens)
        if self.span is not None:
            self.span.end(status, prompt_tokens, completion_tokens)
        self.worker.exchanges.discard(self)
        # Exchange and relay know each other: unlinked, they are freed without the cycle collector.
        self._relay = None

    def _count_adapter(self, status: int, prompt_tokens: int, completion_tokens: int) -> None:
        counted = self.worker.cold_starts.metrics
        if counted is not None:
            counted.settle(self._route.model, status, prompt_tokens, completion_tokens)
