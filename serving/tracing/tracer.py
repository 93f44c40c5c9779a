"""One server span for each relayed request, one client span for each attempt (W3C Trace Context).

Attributes follow OpenTelemetry's semantic conventions for HTTP and generative AI. Never holds text of
a prompt or of an answer. Made by `worker.py` where tracing is configured; called by `exchange.py`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.gateway import metrics
from serving.tracing.export_queue import ExportQueue

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

    from serving.config import Tracing
    from serving.errors import ServingError
    from serving.gateway.metrics import Series
    from serving.gateway.request import Request
    from serving.gateway.resolve import Route
    from serving.routing.snapshot import Replica

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_TRACE_HEADERS = ("traceparent", "tracestate")
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracer:
    """The spans of one worker, and the thread that sends them."""

    def __init__(self, tracing: Tracing, series: Series) -> None:
        """Connects to nothing yet.

        Args:
            tracing: The settings.
            series: Counts spans that do not reach the collector.
        """
        exporter = OTLPSpanExporter(
            endpoint=tracing.endpoint,
            headers={name: value.get_secret_value() for name, value in tracing.headers.items()}
            or None,
            timeout=tracing.export_timeout_s,
        )
        self._queue = ExportQueue(
            exporter,
            tracing,
            lambda number: series.add(metrics.SPANS_DROPPED, number),
            lambda number: series.add(metrics.SPANS_LOST, number),
        )
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(tracing.sample_ratio)),
            resource=Resource.create({"service.name": tracing.service_name}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(self._queue)
        self.tracer = self._provider.get_tracer("headrace")

    def begin(self, request: Request, route: Route) -> RequestSpan:
        """The span of a request that goes to a replica."""
        return RequestSpan(self, request, route)

    def refused(self, request: Request, error: ServingError) -> None:
        """The whole span of a request that the gateway answers by itself."""
        span = self.server_span(request, {})
        _fail(span, error.status, error.code or error.type)
        span.end()

    def server_span(self, request: Request, attributes: dict[str, AttributeValue]) -> Span:
        """Begins a server span, as of when the request was complete."""
        method, path = request.method.decode(), request.path
        age_s = time.monotonic() - request.received_at
        return self.tracer.start_span(
            f"{method} {path}",
            _context_of(request),
            SpanKind.SERVER,
            {
                "http.request.method": method,
                "http.route": path,
                "url.path": path,
                "gen_ai.operation.name": _OPERATIONS.get(path, path.rpartition("/")[2]),
                "headrace.inference_id": request.inference_id.decode(),
                **attributes,
            },
            start_time=time.time_ns() - int(age_s * 1e9),
        )

    def close(self) -> None:
        """Sends what is queued, within a deadline."""
        self._provider.shutdown()


class RequestSpan:
    """The spans of one request: its own, and that of the attempt which is under way."""

    __slots__ = ("_attempt", "_num_attempts", "_replica", "_request", "_span", "_tracer")

    def __init__(self, tracer: Tracer, request: Request, route: Route) -> None:
        self._tracer = tracer.tracer
        self._request = request
        self._span = tracer.server_span(
            request,
            {
                "gen_ai.request.model": route.model.name,
                "gen_ai.response.model": route.model.version,
            },
        )
        self._attempt: Span | None = None
        self._replica: Replica | None = None
        self._num_attempts = 0

    def begin_attempt(self, replica: Replica) -> None:
        """A replica is chosen; connecting counts as part of the attempt."""
        self._replica = replica
        self._num_attempts += 1
        path = self._request.path
        self._attempt = self._tracer.start_span(
            f"POST {path}",
            trace.set_span_in_context(self._span),
            SpanKind.CLIENT,
            {
                "http.request.method": "POST",
                "url.path": path,
                "server.address": replica.host,
                "server.port": replica.port,
                "gen_ai.provider.name": replica.dialect.kind,
                "headrace.replica": replica.name,
                "headrace.attempt": self._num_attempts,
            },
        )

    def trace_lines(self) -> bytes:
        """Header lines by which the engine's spans become children of the attempt's."""
        carrier: dict[str, str] = {}
        around = self._attempt if self._attempt is not None else self._span
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(around))
        return "".join(f"{name}: {value}\r\n" for name, value in carrier.items()).encode()

    def attempt_failed(self, error: ServingError) -> None:
        """The attempt is lost; another one may follow."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            _fail(attempt, error.status, error.code or error.type)
            attempt.end()

    def first_byte(self) -> None:
        """The response begins."""
        waited_s = time.monotonic() - self._request.received_at
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", waited_s)

    def end(self, status: int, prompt_tokens: int, completion_tokens: int) -> None:
        """The request has ended, however that was.

        Args:
            status: HTTP status; 499 if the client left first.
            prompt_tokens: As the engine counted them; 0 if it did not say.
            completion_tokens: The same.
        """
        for span in (self._attempt, self._span):
            if span is None:
                continue
            if prompt_tokens or completion_tokens:
                span.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)
                span.set_attribute("gen_ai.usage.output_tokens", completion_tokens)
            if status >= 400:
                _fail(span, status, str(status))
            else:
                span.set_attribute("http.response.status_code", status)
        if self._replica is not None:
            self._span.set_attribute("headrace.replica", self._replica.name)
            self._span.set_attribute("gen_ai.provider.name", self._replica.dialect.kind)
        self._span.set_attribute("headrace.attempts", self._num_attempts)
        if self._attempt is not None:
            self._attempt.end()
        self._span.end()


def _fail(span: Span, status: int, kind: str) -> None:
    """A 4xx is the client's fault: to a server's span that is no error (HTTP conventions)."""
    span.set_attribute("http.response.status_code", status)
    span.set_attribute("error.type", kind)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


def _context_of(request: Request) -> Context:
    """The client's trace context; an invalid one starts a new trace."""
    carrier = {
        name: value.decode("latin-1")
        for name in _TRACE_HEADERS
        if (value := request.headers.get(name.encode())) is not None
    }
    return _PROPAGATOR.extract(carrier)
