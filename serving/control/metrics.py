"""The control plane's own metrics, for its `/metrics`.

Owns names and labels; those of adapters are in `adapter_metrics.py`, in the same registry.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 60)


class ControlMetrics:
    """One registry of its own, so that two control planes fit into one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "headrace_control_requests",
            "Requests by route and status.",
            ("method", "route", "code"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "headrace_control_request_seconds",
            "Time to answer.",
            ("route",),
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.waiters = Gauge("headrace_control_waiters", "Long polls that wait.", registry=registry)
        self.refused_waiters = Counter(
            "headrace_control_waiters_refused", "Long polls over the bound.", registry=registry
        )
        self.snapshot_version = Gauge(
            "headrace_control_snapshot_version",
            "Number of the published snapshot.",
            registry=registry,
        )
        self.database_up = Gauge(
            "headrace_control_database_up",
            "Whether the database answered the last look.",
            registry=registry,
        )
        self.gateways = Gauge(
            "headrace_control_gateways", "Gateways heard of lately.", registry=registry
        )

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)
