"""TensorRT-LLM's metrics; only with `return_perf_metrics: true`.

Never its `/metrics`: that is JSON which one reader takes away from all others. Gauges stand still
while no request completes. Older versions have the names without a prefix.
"""

from __future__ import annotations

from serving.engines.metrics_map import EngineMetric, MetricsMap, Source


def _named(name: str) -> tuple[str, ...]:
    return (f"trtllm_{name}", name)


TENSORRT_LLM_METRICS = MetricsMap(
    path="/prometheus/metrics",
    scheduler_label="engine_type",
    sources={
        EngineMetric.RUNNING: Source(_named("num_requests_running")),
        EngineMetric.WAITING: Source(_named("num_requests_waiting")),
        EngineMetric.KV_USAGE: Source(_named("kv_cache_utilization"), "mean"),
        # In tokens, as the others count; its own hit counters are in blocks.
        EngineMetric.PREFIX_QUERIES: Source(_named("prompt_tokens_total")),
        EngineMetric.PREFIX_HITS: Source(_named("prompt_cached_tokens_total")),
        EngineMetric.PREFIX_HIT_RATIO: Source(_named("kv_cache_hit_rate"), "mean"),
    },
    lists_adapters=False,
)
