"""Ended spans on their way to the collector: a bounded queue and one thread.

Owns batching and what becomes of spans that find no room. Never delays a request: a full queue drops
the newest span and counts it. OpenTelemetry's own batch processor drops without a count.
"""

from __future__ import annotations

import logging
from collections import deque
from threading import Event, Thread
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import SpanExportResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span
    from opentelemetry.sdk.trace.export import SpanExporter

    from serving.config import Tracing

log = logging.getLogger(__name__)

_MAX_BATCH_SPANS = 512


class ExportQueue(SpanProcessor):
    """Takes spans on the event loop, exports them in a thread of its own."""

    def __init__(
        self,
        exporter: SpanExporter,
        tracing: Tracing,
        on_dropped: Callable[[int], None],
        on_lost: Callable[[int], None],
    ) -> None:
        """Starts the thread.

        Args:
            exporter: Has deadlines of its own.
            tracing: Bound of the queue, and the interval.
            on_dropped: Gets the number of spans that found the queue full; on the event loop.
            on_lost: Gets the number that could not be exported; in the thread.
        """
        self._exporter = exporter
        self._max_spans = tracing.max_queued_spans
        self._interval_s = tracing.export_interval_s
        self._end_s = tracing.export_timeout_s
        self._on_dropped = on_dropped
        self._on_lost = on_lost
        self._queue: deque[ReadableSpan] = deque()
        self._wake = Event()
        self._is_ending = False
        self._thread = Thread(target=self._run, name="trace-export", daemon=True)
        self._thread.start()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing: only ended spans are sent."""

    def on_end(self, span: ReadableSpan) -> None:
        """Queues a span; one that finds no room is dropped."""
        if len(self._queue) >= self._max_spans:
            self._on_dropped(1)
            return
        self._queue.append(span)
        if len(self._queue) == _MAX_BATCH_SPANS:
            self._wake.set()

    def shutdown(self) -> None:
        """Sends what is queued, within the deadline of one export."""
        self._is_ending = True
        self._wake.set()
        self._thread.join(self._end_s)
        self._exporter.shutdown()
        if self._queue:
            log.warning("spans not sent at the end: %d", len(self._queue))

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Asks for an export now; does not wait for it."""
        self._wake.set()
        return True

    def _run(self) -> None:
        while True:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            while self._queue:
                self._export()
            if self._is_ending and not self._queue:
                return

    def _export(self) -> None:
        queue = self._queue
        batch = [queue.popleft() for _ in range(min(len(queue), _MAX_BATCH_SPANS))]
        try:
            result = self._exporter.export(batch)
        except Exception:  # the boundary of the thread: a collector's answer must not end it
            log.exception("spans not exported")
            result = SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS:
            self._on_lost(len(batch))
