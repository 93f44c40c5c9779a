"""What a simulated SGLang says of its load: `/metrics` (with `--enable-metrics`) and `/v1/loads`.

Sources: sglang/srt/observability/metrics_collector.py, entrypoints/v1_loads.py (0.5.23).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batch import Batch
    from sglang_loras import SglangLoras

MAX_TOTAL_TOKENS = 65_536
_SCHEDULER_LABELS = (
    'engine_type="unified",model_name="{model}",moe_ep_rank="0",pp_rank="0",tp_rank="0"'
)
_TOKENIZER_LABELS = 'engine_type="unified",model_name="{model}"'
_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
)
_SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues")


@dataclass
class SglangTotals:
    """Counters since the start; requests, prompt and generated tokens, tokens found in the cache."""

    num_requests: int = 0
    num_aborted: int = 0
    prompt_tokens: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    """By whether the request was streamed."""
    generation_tokens: int = 0
    cached_tokens: int = 0

    @property
    def cache_hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the cache."""
        return self.cached_tokens / max(1, sum(self.prompt_tokens.values()))


def used_tokens(batch: Batch) -> int:
    """Tokens in the KV cache."""
    return sum(one.num_prompt_tokens + one.num_sent for one in batch.running)


def exposition(model: str, batch: Batch, loras: SglangLoras, totals: SglangTotals) -> str:
    """The body of `GET /metrics`: adapters' names are in none of it."""
    used = used_tokens(batch)
    slots = len(loras.loaded)
    gauges = {
        "num_running_reqs": len(batch.running),
        "num_queue_reqs": len(batch.waiting),
        "token_usage": used / MAX_TOTAL_TOKENS,
        "num_used_tokens": used,
        "max_total_num_tokens": MAX_TOTAL_TOKENS,
        "cache_hit_rate": totals.cache_hit_rate,
        "gen_throughput": 0.0,
        "num_retracted_reqs": 0,
        "num_paused_reqs": 0,
        "lora_pool_slots_used": slots,
        "lora_pool_slots_total": loras.max_per_batch,
        "lora_pool_utilization": slots / loras.max_per_batch,
    }
    counters = {
        "generation_tokens_total": totals.generation_tokens,
        "cached_tokens_total": totals.cached_tokens,
        "num_requests_total": totals.num_requests,
        "num_aborted_requests_total": totals.num_aborted,
    }
    scheduler = _SCHEDULER_LABELS.format(model=model)
    tokenizer = _TOKENIZER_LABELS.format(model=model)
    by_streaming = "".join(
        f'sglang:prompt_tokens_total{{is_streaming="{str(is_streaming).lower()}",{tokenizer}}} {n}\n'
        for is_streaming, n in totals.prompt_tokens.items()
    )
    return (
        _samples("gauge", gauges, scheduler)
        + _samples("counter", {"num_retracted_requests_total": 0}, scheduler)
        + _samples("counter", counters, tokenizer)
        + f"# TYPE sglang:prompt_tokens_total counter\n{by_streaming}"
        + "".join(_histogram(name, tokenizer, totals.num_requests) for name in _HISTOGRAMS)
        + _histogram("queue_time_seconds", scheduler, totals.num_requests)
    )


def _histogram(name: str, labels: str, count: int) -> str:
    return (
        f"# TYPE sglang:{name} histogram\n"
        f'sglang:{name}_bucket{{le="+Inf",{labels}}} {count}\n'
        f"sglang:{name}_sum{{{labels}}} 0.0\nsglang:{name}_count{{{labels}}} {count}\n"
    )


def _samples(kind: str, values: dict[str, float], labels: str) -> str:
    return "".join(
        f"# HELP sglang:{name} {name}\n# TYPE sglang:{name} {kind}\n"
        f"sglang:{name}{{{labels}}} {float(value)}\n"
        for name, value in values.items()
    )


def loads(batch: Batch, loras: SglangLoras, totals: SglangTotals, include: str) -> dict[str, Any]:
    """The body of `GET /v1/loads`.

    Raises:
        ValueError: If `include` names a section that there is none of.
    """
    sections = {one for one in include.split(",") if one} or {"all"}
    unknown = sections - {*_SECTIONS, "all"}
    if unknown:
        raise ValueError(f"Invalid include sections: {sorted(unknown)}")
    used = used_tokens(batch)
    load: dict[str, Any] = {
        "dp_rank": 0,
        "timestamp": 0.0,
        "num_running_reqs": len(batch.running),
        "num_waiting_reqs": len(batch.waiting),
        "num_used_tokens": used,
        "num_total_tokens": used,
        "max_total_num_tokens": MAX_TOTAL_TOKENS,
        "token_usage": used / MAX_TOTAL_TOKENS,
        "gen_throughput": 0.0,
        "cache_hit_rate": totals.cache_hit_rate,
        "utilization": 0.0,
        "max_running_requests": batch.max_running,
    }
    if sections & {"lora", "all"}:
        slots, total = len(loras.loaded), loras.max_per_batch
        load["lora"] = {"slots_used": slots, "slots_total": total, "utilization": slots / total}
    if sections & {"queues", "all"}:
        waiting = len(batch.waiting)
        load["queues"] = {"waiting": waiting, "grammar": 0, "paused": 0, "retracted": 0}
    return {"timestamp": 0.0, "version": "0.5.23", "dp_rank_count": 1, "loads": [load]}
