"""What the reconciler counts.

Owns the metrics' names and labels. Labels are bounded by the fleet and by what it can hold: versions
that leave a replica leave the metrics.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LOAD_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class AdapterMetrics:
    """The adapters' metrics of one control plane."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.resident = Gauge(
            "headrace_adapter_resident",
            "1 for each version that is proven on a replica.",
            ["replica", "version"],
            registry=registry,
        )
        self.loads = Counter(
            "headrace_adapter_loads",
            "Loads that a replica was asked for, by outcome.",
            ["replica", "outcome"],
            registry=registry,
        )
        self.load_seconds = Histogram(
            "headrace_adapter_load_seconds",
            "Duration of loads that succeeded, the fetch to the node included.",
            ["replica"],
            buckets=_LOAD_BUCKETS,
            registry=registry,
        )
        self.evictions = Counter(
            "headrace_adapter_evictions",
            "Versions unloaded from a replica.",
            ["replica"],
            registry=registry,
        )
        self.probe_failures = Counter(
            "headrace_adapter_probe_failures",
            "Probes that other weights answered, or that got no answer from the engine.",
            ["replica"],
            registry=registry,
        )
        self.ready_seconds = Histogram(
            "headrace_adapter_ready_seconds",
            "From the decision to place a version on a replica to its proof there.",
            ["replica"],
            buckets=_LOAD_BUCKETS,
            registry=registry,
        )
        self.overflows = Counter(
            "headrace_adapter_asks_dropped",
            "Requests for cold versions that were not placed as too many waited.",
            registry=registry,
        )
