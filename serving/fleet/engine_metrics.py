"""What the engines measure, under one vocabulary for all three: scraped, shared, shown at /metrics.

One worker scrapes (the first) and writes a table that all read: N workers would ask every engine N
times, and routing in any worker can use the values. If that worker dies, the values go stale and
vanish until its successor has scraped again. Never asks an engine on behalf of a request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from serving.engines.metrics_map import EngineMetric
from serving.engines.sglang_metrics import SGLANG_METRICS
from serving.engines.tensorrt_llm_metrics import TENSORRT_LLM_METRICS
from serving.engines.vllm_metrics import VLLM_METRICS
from serving.fleet.http_client import get
from serving.gateway.shared_table import SharedTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from prometheus_client.core import Metric
    from prometheus_client.samples import Sample

    from serving.config import EngineKind
    from serving.engines.metrics_map import MetricsMap, Source
    from serving.routing.snapshot import Replica

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
TIMEOUT_S = 4.0
MISSES_TO_BE_STALE = 3
MAX_BODY_BYTES = 2 * 1024 * 1024
MAX_LINES = 4096
"""Lines of the metrics that are read; an engine with more of them is not read at all."""
_AT_ONCE = 16

MAPS: dict[EngineKind, MetricsMap] = {
    "vllm": VLLM_METRICS,
    "sglang": SGLANG_METRICS,
    "tensorrt-llm": TENSORRT_LLM_METRICS,
}
_COLUMNS = {metric: 1 + offset for offset, metric in enumerate(EngineMetric)}
_SCRAPED_AT = 0
_NUM_COLUMNS = 1 + len(EngineMetric)
_SEPARATOR = "\x1f"
_HELP = {
    EngineMetric.RUNNING: "Requests that the engine works on.",
    EngineMetric.WAITING: "Requests in the engine's queue.",
    EngineMetric.KV_USAGE: "Share of the KV cache that is in use, 0 to 1.",
    EngineMetric.PREFIX_QUERIES: "Prompt tokens looked up in the prefix cache.",
    EngineMetric.PREFIX_HITS: "Prompt tokens found in the prefix cache.",
    EngineMetric.PREFIX_HIT_RATIO: "The engine's own recent hit rate, 0 to 1, where it has one.",
    EngineMetric.ADAPTERS_LOADED: "Adapters that the replica lists.",
    EngineMetric.ADAPTERS_ACTIVE: "Adapters in use by its requests, or in its GPU pool.",
    EngineMetric.PREEMPTIONS: "Requests put back because the KV cache was full.",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A replica to scrape, and the number of adapters in its list of models."""

    replica: Replica
    num_adapters: int


class EngineTable:
    """The last values of each replica, readable by all workers."""

    def __init__(self, metrics_dir: Path) -> None:
        """Maps the table; the file is made where it is not there."""
        self._table = SharedTable(metrics_dir / "engines.f64", _NUM_COLUMNS)

    def write(self, replica: Replica, values: dict[EngineMetric, float]) -> None:
        """Keeps a scrape's values; what it did not have is unknown."""
        base = self._table.base_of(f"{replica.name}{_SEPARATOR}{replica.dialect.kind}")
        for metric, column in _COLUMNS.items():
            self._table.values[base + column] = values.get(metric, math.nan)
        self._table.values[base + _SCRAPED_AT] = monotonic()

    def families(self, replica_names: Iterable[str]) -> Iterable[Metric]:
        """Metric families of those replicas whose values are not stale.

        Args:
            replica_names: The fleet's; others have left it.
        """
        now, names = monotonic(), frozenset(replica_names)
        fresh = []
        for key, columns in self._table.rows():
            replica, _, kind = key.partition(_SEPARATOR)
            # The clock starts anew with the machine, the file may be older.
            is_fresh = 0 <= now - columns[_SCRAPED_AT] <= MISSES_TO_BE_STALE * INTERVAL_S
            if replica in names and is_fresh:
                fresh.append((replica, kind, columns))
        for metric, column in _COLUMNS.items():
            family_of = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
            name = f"headrace_engine_{metric.value.removesuffix('_total')}"
            family = family_of(name, _HELP[metric], labels=["replica", "engine"])
            for replica, kind, columns in fresh:
                if not math.isnan(columns[column]):
                    family.add_metric([replica, kind], columns[column])
            yield family


class EngineScraper:
    """Asks every replica for its metrics, again and again."""

    def __init__(
        self, table: EngineTable, api_key: str | None, targets: Callable[[], Sequence[Target]]
    ) -> None:
        """Asks nothing until `run`.

        Args:
            table: Where the values go.
            api_key: Bearer token for the replicas, or None.
            targets: The replicas that can be reached, at this moment.
        """
        self._table = table
        self._api_key = api_key
        self._targets = targets

    async def run(self) -> None:
        """Scrapes until cancelled, every five seconds."""
        while True:
            at_once = asyncio.Semaphore(_AT_ONCE)
            async with asyncio.TaskGroup() as tasks:
                for target in self._targets():
                    tasks.create_task(self._scrape(target, at_once))
                tasks.create_task(asyncio.sleep(INTERVAL_S))

    async def _scrape(self, target: Target, at_once: asyncio.Semaphore) -> None:
        """Misses are silent: an engine may have its metrics switched off."""
        replica = target.replica
        mapped = MAPS[replica.dialect.kind]
        async with at_once:
            try:
                got = await get(
                    replica.host,
                    replica.port,
                    mapped.path,
                    timeout_s=TIMEOUT_S,
                    api_key=self._api_key,
                    tls=replica.tls,
                    max_body_bytes=MAX_BODY_BYTES,
                )
                values = read(got.body, mapped) if got.status == 200 else {}
            except (OSError, ValueError) as error:
                log.debug("metrics of %s not read: %s", replica.name, error)
                return
        if values:
            if mapped.lists_adapters:
                values[EngineMetric.ADAPTERS_LOADED] = target.num_adapters
            self._table.write(replica, values)


# From the engine's text to our values; pure.


def read(body: bytes, mapped: MetricsMap) -> dict[EngineMetric, float]:
    """Our values in an engine's exposition; what it does not have is left out.

    Raises:
        ValueError: If it is not Prometheus text, or has too many lines of the metrics.
    """
    samples = _samples(body, mapped)
    values: dict[EngineMetric, float] = {}
    for metric, source in mapped.sources.items():
        name = next((one for one in source.names if one in samples), None)
        if name is not None:
            values[metric] = _combined(samples[name], source, mapped.scheduler_label)
    if mapped.newest_adapters in samples:
        values[EngineMetric.ADAPTERS_ACTIVE] = _num_adapters(samples, mapped)
    return {metric: value for metric, value in values.items() if math.isfinite(value)}


def _samples(body: bytes, mapped: MetricsMap) -> dict[str, list[Sample]]:
    """Samples of the metrics that are read, by name.

    Only their lines are parsed: an exposition has thousands, and parsing them all would hold up the
    tokens of every stream for tens of milliseconds.
    """
    names = b"|".join(re.escape(name.encode()) for name in sorted(mapped.names()))
    lines = re.findall(rb"^(?:" + names + rb")[{ ][^\n]*$", body, re.MULTILINE)
    if len(lines) > MAX_LINES:
        raise ValueError(f"{len(lines)} lines")
    text = b"\n".join(lines).decode() + "\n"
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def _combined(samples: Sequence[Sample], source: Source, scheduler_label: str) -> float:
    values = [sample.value for sample in samples]
    if source.by_scheduler:
        by_scheduler: dict[str, float] = {}
        for sample in samples:
            scheduler = sample.labels.get(scheduler_label, "")
            by_scheduler[scheduler] = max(by_scheduler.get(scheduler, -math.inf), sample.value)
        values = list(by_scheduler.values())
    return sum(values) / len(values) if source.combine == "mean" else sum(values)


def _num_adapters(samples: dict[str, list[Sample]], mapped: MetricsMap) -> int:
    newest = max(samples[mapped.newest_adapters or ""], key=lambda sample: sample.value)
    names = {
        name.strip()
        for label in mapped.adapter_labels
        for name in newest.labels.get(label, "").split(",")
    }
    return len(names - {""})
