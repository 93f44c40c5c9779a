"""vLLM's metrics (0.32, v1/metrics/loggers.py); on by default."""

from __future__ import annotations

from serving.engines.metrics_map import EngineMetric, MetricsMap, Source

VLLM_METRICS = MetricsMap(
    path="/metrics",
    scheduler_label="engine",
    sources={
        EngineMetric.RUNNING: Source(("vllm:num_requests_running",)),
        EngineMetric.WAITING: Source(("vllm:num_requests_waiting",)),
        EngineMetric.KV_USAGE: Source(("vllm:kv_cache_usage_perc",), "mean"),
        EngineMetric.PREFIX_QUERIES: Source(("vllm:prefix_cache_queries_total",)),
        EngineMetric.PREFIX_HITS: Source(("vllm:prefix_cache_hits_total",)),
        EngineMetric.PREEMPTIONS: Source(("vllm:num_preemptions_total",)),
    },
    # Old label sets stay, with older times; both lists hold every active adapter
    # (v1/metrics/stats.py).
    newest_adapters="vllm:lora_requests_info",
    adapter_labels=("running_lora_adapters", "waiting_lora_adapters"),
)
