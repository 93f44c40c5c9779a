"""What the gateway measures of adapter versions: a small table of its own beside `metrics.py`'s.

One row for each (alias, version), whatever the endpoint and the replica, so that thousands of versions
do not fill the table of requests. Rows of versions that are no longer published are given to new ones.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from serving.gateway.shared_table import SharedTable

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence
    from pathlib import Path

    from prometheus_client.core import Metric

    from serving.routing.snapshot import Model

MAX_ROWS = 4096
WAIT_BOUNDS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0)

Outcome = Literal["ready", "late", "queue_full", "client_left", "unavailable", "drained"]
OUTCOMES: tuple[Outcome, ...] = (
    "ready",
    "late",
    "queue_full",
    "client_left",
    "unavailable",
    "drained",
)

_REQUESTS = 0
_ERRORS = 1
_PROMPT_TOKENS = 2
_COMPLETION_TOKENS = 3
_WAITING = 4
_OUTCOMES = 5
_WAIT = _OUTCOMES + len(OUTCOMES)
_WAIT_SUM = _WAIT + len(WAIT_BOUNDS_S) + 1
_NUM_COLUMNS = _WAIT_SUM + 1
_SEPARATOR = "\x1f"
_OVERFLOW = ("", "")


class Totals(NamedTuple):
    """Traffic of one version since its rows were made."""

    requests: float
    tokens: float


def open_tables(folder: Path, num_workers: int) -> list[SharedTable]:
    """The tables of all workers, made where they do not exist."""
    return [
        SharedTable(folder / f"adapters-{number}.f64", _NUM_COLUMNS, MAX_ROWS)
        for number in range(num_workers)
    ]


class AdapterMetrics:
    """The rows of one worker."""

    def __init__(self, table: SharedTable, published: Callable[[], Container[str]]) -> None:
        """Takes over the counters of a dead predecessor and voids its gauges.

        Args:
            table: The worker's own.
            published: The versions that are published now: their rows are kept.
        """
        self._table = table
        self._published = published
        self._bases: dict[tuple[str, str], int] = {}
        for _, columns in table.rows():
            columns[_WAITING] = 0.0

    def settle(self, model: Model, status: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Counts a request that has ended."""
        values, base = self._table.values, self._base_of(model)
        values[base + _REQUESTS] += 1
        values[base + _ERRORS] += status >= 400
        values[base + _PROMPT_TOKENS] += prompt_tokens
        values[base + _COMPLETION_TOKENS] += completion_tokens

    def wait_begins(self, model: Model) -> None:
        """A request waits for the version to be loaded."""
        self._table.values[self._base_of(model) + _WAITING] += 1

    def wait_ends(self, model: Model, outcome: Outcome, seconds: float) -> None:
        """It waits no more; whatever it is answered."""
        values, base = self._table.values, self._base_of(model)
        values[base + _WAITING] -= 1
        values[base + _WAIT + bisect_left(WAIT_BOUNDS_S, seconds)] += 1
        values[base + _WAIT_SUM] += seconds
        self.count(model, outcome)

    def count(self, model: Model, outcome: Outcome) -> None:
        """Counts how a wait ended, or why there was none."""
        self._table.values[self._base_of(model) + _OUTCOMES + OUTCOMES.index(outcome)] += 1

    def _base_of(self, model: Model) -> int:
        labels = ("" if model.name == model.version else model.name, model.version)
        base = self._bases.get(labels)
        if base is None:
            key = _SEPARATOR.join(labels)
            if self._table.is_full:
                self._make_room(key)
            base = self._bases[labels] = self._table.base_of(key)
        return base

    def _make_room(self, key: str) -> None:
        published = self._published()
        for known, columns in self._table.rows():
            version = _labels_of(known)[1]
            if known and version not in published and not columns[_WAITING]:
                self._bases.clear()
                self._table.reuse(known, key)
                return


def _labels_of(key: str) -> tuple[str, str]:
    alias, _, version = key.partition(_SEPARATOR)
    return (alias, version) if version else _OVERFLOW


def _summed(tables: Sequence[SharedTable]) -> dict[tuple[str, str], list[float]]:
    summed: dict[tuple[str, str], list[float]] = {}
    for table in tables:
        for key, columns in table.rows():
            labels = _labels_of(key)
            own = [float(value) for value in columns]
            before = summed.get(labels)
            summed[labels] = (
                own if before is None else [a + b for a, b in zip(before, own, strict=True)]
            )
    return summed


def totals(tables: Sequence[SharedTable]) -> dict[str, Totals]:
    """Version → what all workers have counted of it, under whichever alias."""
    by_version: dict[str, Totals] = {}
    for (_, version), columns in _summed(tables).items():
        if version:
            tokens = columns[_PROMPT_TOKENS] + columns[_COMPLETION_TOKENS]
            before = by_version.get(version, Totals(0.0, 0.0))
            by_version[version] = Totals(
                before.requests + columns[_REQUESTS], before.tokens + tokens
            )
    return by_version


_COUNTERS = (
    ("requests", "Requests of an adapter version that have ended.", _REQUESTS),
    ("errors", "Those that ended with a status of 400 or more.", _ERRORS),
    ("prompt_tokens", "Their prompt tokens, as the engines counted them.", _PROMPT_TOKENS),
    ("completion_tokens", "Their generated tokens.", _COMPLETION_TOKENS),
)


def families(tables: Sequence[SharedTable]) -> Iterable[Metric]:
    """What `/metrics` says of adapters."""
    rows = _summed(tables)
    for name, text, column in _COUNTERS:
        family = CounterMetricFamily(f"headrace_adapter_{name}", text, labels=["alias", "version"])
        for labels, columns in rows.items():
            if columns[_REQUESTS]:
                family.add_metric(labels, columns[column])
        yield family
    yield from _waits(rows)


def _waits(rows: Mapping[tuple[str, str], list[float]]) -> Iterable[Metric]:
    waiting = GaugeMetricFamily(
        "headrace_adapter_waiting", "Requests that wait for a version.", labels=["version"]
    )
    ended = CounterMetricFamily(
        "headrace_adapter_waits",
        "Requests whose version no replica had ready, by what became of them.",
        labels=["version", "outcome"],
    )
    by_version: dict[str, list[float]] = {}
    for (_, version), columns in rows.items():
        before = by_version.get(version)
        by_version[version] = (
            columns if before is None else [a + b for a, b in zip(before, columns, strict=True)]
        )
    buckets = [0.0] * (len(WAIT_BOUNDS_S) + 1)
    waited_s = 0.0
    for version, columns in by_version.items():
        if columns[_WAITING]:
            waiting.add_metric([version], columns[_WAITING])
        for outcome, count in zip(OUTCOMES, columns[_OUTCOMES:_WAIT], strict=True):
            if count:
                ended.add_metric([version, outcome], count)
        buckets = [a + b for a, b in zip(buckets, columns[_WAIT:_WAIT_SUM], strict=True)]
        waited_s += columns[_WAIT_SUM]
    yield waiting
    yield ended
    histogram = HistogramMetricFamily(
        "headrace_adapter_wait_seconds", "How long requests waited for their version."
    )
    bounds = [*map(str, WAIT_BOUNDS_S), "+Inf"]
    histogram.add_metric([], list(zip(bounds, accumulate(buckets), strict=True)), waited_s)
    yield histogram
