"""What the gateway measures: columns of the shared table, and their exposition by prometheus-client.

The hot path writes columns through `Series`; `/metrics` adds the tables of all workers up. Labels are
bounded: endpoint and alias come from tables of ours, replica from the fleet; what clients send never
becomes a label.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from serving.gateway import adapter_metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from prometheus_client.core import Metric

    from serving.fleet.engine_metrics import EngineTable
    from serving.gateway.shared_table import SharedTable

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
CLIENT_CLOSED = 499
"""Status for requests whose client left first; nginx's number, never sent."""

STATUSES = (
    200,
    201,
    202,
    204,
    400,
    401,
    403,
    404,
    405,
    408,
    409,
    412,
    413,
    414,
    415,
    422,
    429,
    431,
    CLIENT_CLOSED,
    500,
    502,
    503,
    504,
)
_NUM_WELL = sum(status < 400 for status in STATUSES)
_OTHER_STATUS = len(STATUSES)
_STATUS_OFFSET = {status: offset for offset, status in enumerate(STATUSES)}

# Buckets as vLLM's (v1/metrics/loggers.py), so that a gateway's and an engine's can be compared.
TTFT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
ITL_BOUNDS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
DURATION_BOUNDS_S = (
    0.005, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0,
    50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
)  # fmt: skip

IN_FLIGHT = 0
PROMPT_TOKENS = 1
COMPLETION_TOKENS = 2
REQUEST_BYTES = 3
RESPONSE_BYTES = 4
CLIENT_ABORTS = 5
RETRIES = 6
CONNECTIONS = 7
RELOADS = 8
RELOADS_REFUSED = 9
SPANS_DROPPED = 10
SPANS_LOST = 11
_REQUESTS = 12
_TTFT = _REQUESTS + len(STATUSES) + 1
_TTFT_SUM = _TTFT + len(TTFT_BOUNDS_S) + 1
ITL = _TTFT_SUM + 1
ITL_SUM = ITL + len(ITL_BOUNDS_S) + 1
_DURATION = ITL_SUM + 1
_DURATION_SUM = _DURATION + len(DURATION_BOUNDS_S) + 1
NUM_COLUMNS = _DURATION_SUM + 1

_SEPARATOR = "\x1f"
"""Not NUL: the table pads its keys with that, so that a last empty label would be lost."""
NO_LABELS = ("", "", "")


class Series:
    """The columns of one (endpoint, alias, replica): what a request is counted under.

    Attributes:
        values: The worker's table; `base` is the index of this row's first column.
    """

    __slots__ = ("base", "values")

    def __init__(self, table: SharedTable, labels: tuple[str, str, str]) -> None:
        self.values = table.values
        self.base = table.base_of(_SEPARATOR.join(labels))

    def add(self, column: int, amount: float) -> None:
        """Adds to a counter or gauge."""
        self.values[self.base + column] += amount

    def observe_ttft(self, seconds: float) -> None:
        """Time from the complete request to the first event of a stream."""
        base = self.base
        self.values[base + _TTFT + bisect_left(TTFT_BOUNDS_S, seconds)] += 1
        self.values[base + _TTFT_SUM] += seconds

    def observe_itl(self, seconds: float) -> None:
        """Time between two events of a stream."""
        base = self.base
        self.values[base + ITL + bisect_left(ITL_BOUNDS_S, seconds)] += 1
        self.values[base + ITL_SUM] += seconds

    def finish(self, status: int, seconds: float) -> None:
        """Counts a request that has ended, with its status and its time from request to end."""
        values, base = self.values, self.base
        values[base + _REQUESTS + _STATUS_OFFSET.get(status, _OTHER_STATUS)] += 1
        values[base + _DURATION + bisect_left(DURATION_BOUNDS_S, seconds)] += 1
        values[base + _DURATION_SUM] += seconds

    def settle(
        self,
        status: int,
        seconds: float,
        request_bytes: int,
        prompt_tokens: int,
        completion_tokens: int,
    ) -> None:
        """Ends a request that was in flight: one call for everything that is known at its end."""
        values, base = self.values, self.base
        values[base + IN_FLIGHT] -= 1
        values[base + REQUEST_BYTES] += request_bytes
        values[base + PROMPT_TOKENS] += prompt_tokens
        values[base + COMPLETION_TOKENS] += completion_tokens
        self.finish(status, seconds)


class Metrics:
    """The series of one worker, made at first use."""

    def __init__(self, table: SharedTable) -> None:
        """Takes over the counters of a dead predecessor and voids its gauges."""
        self._table = table
        self._series: dict[tuple[str, str, str], Series] = {}
        for _, columns in table.rows():
            columns[IN_FLIGHT] = 0.0
            columns[CONNECTIONS] = 0.0
        self.worker = self.of(NO_LABELS)

    def of(self, labels: tuple[str, str, str]) -> Series:
        """The series of (endpoint, alias, replica)."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = Series(self._table, labels)
        return series


class FleetCollector(Collector):
    """Adds the tables of all workers up, at each scrape."""

    def __init__(
        self,
        tables: Sequence[SharedTable],
        replica_health: Mapping[str, bool],
        engines: EngineTable | None = None,
        adapters: Sequence[SharedTable] = (),
    ) -> None:
        self._adapters = adapters
        self._tables = tables
        self._replica_health = replica_health
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        """All metric families of the gateway."""
        rows = self._summed_rows()
        yield from _counters(rows)
        yield from _gauges(rows)
        yield _histogram("time_to_first_token_seconds", _HELP_TTFT, rows, _TTFT, TTFT_BOUNDS_S)
        yield _histogram("inter_token_latency_seconds", _HELP_ITL, rows, ITL, ITL_BOUNDS_S)
        yield _histogram("request_duration_seconds", _HELP_TIME, rows, _DURATION, DURATION_BOUNDS_S)
        healthy = GaugeMetricFamily(
            "headrace_replica_healthy", "1 while the replica takes requests.", labels=["replica"]
        )
        for name, is_healthy in self._replica_health.items():
            healthy.add_metric([name], float(is_healthy))
        yield healthy
        overflow = CounterMetricFamily(
            "headrace_metric_rows_refused",
            "Label sets counted under empty labels for lack of room.",
        )
        overflow.add_metric([], sum(x.overflows for x in (*self._tables, *self._adapters)))
        yield overflow
        if self._adapters:
            yield from adapter_metrics.families(self._adapters)
        if self._engines is not None:
            yield from self._engines.families(self._replica_health)

    def _summed_rows(self) -> dict[tuple[str, ...], list[float]]:
        summed: dict[tuple[str, ...], list[float]] = {}
        for table in self._tables:
            for key, columns in table.rows():
                labels = tuple(key.split(_SEPARATOR)) if key else NO_LABELS
                before = summed.get(labels)
                own = [float(value) for value in columns]
                summed[labels] = (
                    own if before is None else [a + b for a, b in zip(before, own, strict=True)]
                )
        return summed


_HELP_TTFT = "From the complete request to the first event of its stream."
_HELP_ITL = "Between two events of a stream."
_HELP_TIME = "From the complete request to the end of its response."
_LABELS = ["endpoint", "model", "replica"]

_COUNTERS = (
    ("prompt_tokens", "Prompt tokens, as the engines counted them.", PROMPT_TOKENS),
    ("completion_tokens", "Generated tokens, as the engines counted them.", COMPLETION_TOKENS),
    ("request_bytes", "Bytes of request bodies.", REQUEST_BYTES),
    ("response_bytes", "Bytes sent to clients.", RESPONSE_BYTES),
    ("client_aborts", "Requests whose client left before the end.", CLIENT_ABORTS),
    ("retries", "Attempts that failed before the first byte and went to another replica.", RETRIES),
)


def _counters(rows: Mapping[tuple[str, ...], list[float]]) -> Iterable[Metric]:
    requests = CounterMetricFamily(
        "headrace_requests", "Requests that have ended, by HTTP status.", labels=[*_LABELS, "code"]
    )
    errors = CounterMetricFamily(
        "headrace_errors", "Requests that ended with a status of 400 or more.", labels=_LABELS
    )
    for labels, columns in rows.items():
        ended = columns[_REQUESTS:_TTFT]
        for code, count in zip((*map(str, STATUSES), "other"), ended, strict=True):
            if count:
                requests.add_metric([*labels, code], count)
        if any(ended):
            errors.add_metric(labels, sum(ended[_NUM_WELL:]))
    yield requests
    yield errors
    for name, text, column in _COUNTERS:
        family = CounterMetricFamily(f"headrace_{name}", text, labels=_LABELS)
        for labels, columns in rows.items():
            if labels != NO_LABELS:
                family.add_metric(labels, columns[column])
        yield family
    yield from _worker_counters(rows)


def _worker_counters(rows: Mapping[tuple[str, ...], list[float]]) -> Iterable[Metric]:
    """What belongs to no request."""

    def total(column: int) -> float:
        return sum(columns[column] for columns in rows.values())

    reloads = CounterMetricFamily(
        "headrace_config_reloads", "Reloads of the configuration.", labels=["result"]
    )
    reloads.add_metric(["ok"], total(RELOADS))
    reloads.add_metric(["refused"], total(RELOADS_REFUSED))
    yield reloads
    spans = CounterMetricFamily(
        "headrace_trace_spans_lost", "Spans that did not reach the collector.", labels=["reason"]
    )
    spans.add_metric(["queue_full"], total(SPANS_DROPPED))
    spans.add_metric(["export_failed"], total(SPANS_LOST))
    yield spans


def _gauges(rows: Mapping[tuple[str, ...], list[float]]) -> Iterable[Metric]:
    in_flight = GaugeMetricFamily(
        "headrace_requests_in_flight", "Requests that have not ended.", labels=_LABELS
    )
    for labels, columns in rows.items():
        if labels != NO_LABELS:
            in_flight.add_metric(labels, columns[IN_FLIGHT])
    yield in_flight
    connections = sum(columns[CONNECTIONS] for columns in rows.values())
    yield GaugeMetricFamily("headrace_client_connections", "Open client connections.", connections)


def _histogram(
    name: str,
    text: str,
    rows: Mapping[tuple[str, ...], list[float]],
    at: int,
    bounds_s: Sequence[float],
) -> Metric:
    family = HistogramMetricFamily(f"headrace_{name}", text, labels=_LABELS)
    end = at + len(bounds_s) + 1
    bounds = [*map(str, bounds_s), "+Inf"]
    for labels, columns in rows.items():
        if any(columns[at:end]):
            buckets = list(zip(bounds, accumulate(columns[at:end]), strict=True))
            family.add_metric(labels, buckets, columns[end])
    return family


def exposition(
    tables: Sequence[SharedTable],
    replica_health: Mapping[str, bool],
    engines: EngineTable | None = None,
    adapters: Sequence[SharedTable] = (),
) -> bytes:
    """The text that `/metrics` answers with."""
    registry = CollectorRegistry()
    registry.register(FleetCollector(tables, replica_health, engines, adapters))
    return generate_latest(registry)
