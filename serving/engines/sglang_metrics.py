"""SGLang's metrics (0.5.23, observability/metrics_collector.py); only with `--enable-metrics`."""

from __future__ import annotations

from serving.engines.metrics_map import EngineMetric, MetricsMap, Source

SGLANG_METRICS = MetricsMap(
    path="/metrics",
    scheduler_label="dp_rank",
    sources={
        EngineMetric.RUNNING: Source(("sglang:num_running_reqs",)),
        EngineMetric.WAITING: Source(("sglang:num_queue_reqs",)),
        EngineMetric.KV_USAGE: Source(("sglang:token_usage",), "mean"),
        # Counted in tokens by the tokenizer process, as vLLM counts its own.
        EngineMetric.PREFIX_QUERIES: Source(("sglang:prompt_tokens_total",), by_scheduler=False),
        EngineMetric.PREFIX_HITS: Source(("sglang:cached_tokens_total",), by_scheduler=False),
        EngineMetric.PREFIX_HIT_RATIO: Source(("sglang:cache_hit_rate",), "mean"),
        EngineMetric.ADAPTERS_ACTIVE: Source(("sglang:lora_pool_slots_used",)),
        EngineMetric.PREEMPTIONS: Source(("sglang:num_retracted_requests_total",)),
    },
)
