"""What an engine's Prometheus metrics mean in our vocabulary: one `MetricsMap` an engine, as data.

Does no I/O: `serving/fleet/engine_metrics.py` scrapes by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Combine = Literal["sum", "mean"]


class EngineMetric(StrEnum):
    """Our names, after the prefix `headrace_engine_`."""

    RUNNING = "requests_running"
    WAITING = "requests_waiting"
    KV_USAGE = "kv_cache_usage_ratio"
    PREFIX_QUERIES = "prefix_cache_queries_total"
    PREFIX_HITS = "prefix_cache_hits_total"
    PREFIX_HIT_RATIO = "prefix_cache_hit_ratio"
    ADAPTERS_LOADED = "adapters_loaded"
    ADAPTERS_ACTIVE = "adapters_active"
    PREEMPTIONS = "preemptions_total"

    @property
    def is_counter(self) -> bool:
        """Whether it only grows."""
        return self.value.endswith("_total")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one of our metrics comes from.

    Attributes:
        names: The engine's, newest first; the first that is there counts.
        combine: How the values of several schedulers become one.
        by_scheduler: Whether ranks of one scheduler repeat the same value, so that each scheduler
            counts once, by its highest; otherwise every label set counts.
    """

    names: tuple[str, ...]
    combine: Combine = "sum"
    by_scheduler: bool = True


@dataclass(frozen=True, slots=True)
class MetricsMap:
    """One engine's exposition.

    Attributes:
        path: GET; Prometheus text.
        scheduler_label: Tells schedulers (data-parallel engines) apart.
        sources: Our metric → where it is.
        newest_adapters: Metric whose labels list active adapters and whose value is a time; the
            newest label set counts.
        adapter_labels: Those labels; names separated by commas.
        lists_adapters: Whether the engine's list of models has its adapters.
    """

    path: str
    scheduler_label: str
    sources: dict[EngineMetric, Source]
    newest_adapters: str | None = None
    adapter_labels: tuple[str, ...] = ()
    lists_adapters: bool = True

    def names(self) -> frozenset[str]:
        """Every metric of the engine that is read."""
        found = {name for source in self.sources.values() for name in source.names}
        if self.newest_adapters is not None:
            found.add(self.newest_adapters)
        return frozenset(found)
