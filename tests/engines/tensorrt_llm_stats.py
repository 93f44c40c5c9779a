"""What a simulated TensorRT-LLM says of itself: iteration statistics, gauges, KV-cache events.

Sources: tensorrt_llm/serve/openai_server.py, metrics/collector.py. Habits: statistics and events are
gone once read; gauges are those of the moment when a request last completed.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batch import Batch, Generation

TOKENS_PER_BLOCK = 32
MAX_BLOCKS = 2048
_MAX_ITERATIONS = 1000
_LABELS = 'engine_type="undefined",model_name="undefined"'
_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
)
_GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_utilization",
    "kv_cache_hit_rate",
    "kv_cache_max_blocks",
    "kv_cache_free_blocks",
    "kv_cache_used_blocks",
    "num_paused_requests",
)


def blocks_of(num_tokens: int) -> int:
    """KV-cache blocks that so many tokens take."""
    return -(-num_tokens // TOKENS_PER_BLOCK)


class TensorrtLlmStats:
    """The accounts of one server."""

    def __init__(self, event_buffer_max_size: int) -> None:
        """Starts empty.

        Args:
            event_buffer_max_size: How many KV-cache events are kept; 0 for none, its default.
        """
        self._iterations: deque[dict[str, Any]] = deque(maxlen=_MAX_ITERATIONS)
        self._events: deque[dict[str, Any]] = deque(maxlen=event_buffer_max_size)
        self._next_event = 0
        self._gauges: dict[str, float] = dict.fromkeys(_GAUGES, 0)
        self._gauges["kv_cache_max_blocks"] = self._gauges["kv_cache_free_blocks"] = MAX_BLOCKS
        self._counters: Counter[str] = Counter()
        self._successes: Counter[str] = Counter()
        self._errors: Counter[int] = Counter()
        self._event({"type": "created", "num_blocks_per_cache_level": [MAX_BLOCKS, 0]})

    def complete(self, generation: Generation, batch: Batch, lora_int_id: int, prompt: str) -> None:
        """A request has completed: the one moment in which gauges move."""
        num_tokens = generation.usage["total_tokens"]
        used = sum(blocks_of(one.usage["total_tokens"]) for one in batch.running)
        self._gauges |= {
            "num_requests_running": len(batch.running),
            "num_requests_waiting": len(batch.waiting),
            "kv_cache_utilization": used / MAX_BLOCKS,
            "kv_cache_used_blocks": used,
            "kv_cache_free_blocks": MAX_BLOCKS - used,
        }
        self._iterations.append(
            {
                "iter": len(self._iterations),
                "numActiveRequests": len(batch.running),
                "numQueuedRequests": len(batch.waiting),
                "kvCacheStats": {
                    "maxNumBlocks": MAX_BLOCKS,
                    "usedNumBlocks": used,
                    "freeNumBlocks": MAX_BLOCKS - used,
                    "tokensPerBlock": TOKENS_PER_BLOCK,
                },
            }
        )
        self._counters["prompt_tokens_total"] += generation.num_prompt_tokens
        self._counters["generation_tokens_total"] += num_tokens - generation.num_prompt_tokens
        self._counters["kv_cache_missed_blocks_total"] += blocks_of(generation.num_prompt_tokens)
        self._successes[generation.finish_reason] += 1
        self._store(prompt, lora_int_id)

    def fail(self, status: int) -> None:
        """A request has ended with an error."""
        self._errors[status] += 1

    def drain_iterations(self) -> list[dict[str, Any]]:
        """The body of `GET /metrics`: what has happened since somebody last asked."""
        drained = list(self._iterations)
        self._iterations.clear()
        return drained

    def drain_events(self) -> list[dict[str, Any]]:
        """The body of `POST /kv_cache_events`: they are gone then, for everybody."""
        drained = list(self._events)
        self._events.clear()
        return drained

    def exposition(self) -> str:
        """The body of `GET /prometheus/metrics`; nothing in it names an adapter."""
        counters = {
            name: self._counters[name]
            for name in (
                "prompt_tokens_total",
                "generation_tokens_total",
                "prompt_cached_tokens_total",
                "kv_cache_reused_blocks_total",
                "kv_cache_missed_blocks_total",
            )
        }
        lines = [_family("gauge", name, {"": value}) for name, value in self._gauges.items()]
        lines += [_family("counter", name, {"": value}) for name, value in counters.items()]
        lines.append(
            _family(
                "counter",
                "request_success_total",
                {f'finished_reason="{reason}",': n for reason, n in self._successes.items()},
            )
        )
        lines.append(
            _family(
                "counter",
                "request_error_total",
                {f'http_code="{status}",': n for status, n in self._errors.items()},
            )
        )
        count = sum(self._successes.values())
        lines += [_histogram(name, count) for name in _HISTOGRAMS]
        return "".join(lines)

    def _store(self, prompt: str, lora_int_id: int) -> None:
        """One event for the prompt's blocks; hashes depend on the adapter's id."""
        tokens = [int.from_bytes(word.encode()[:4], "little") for word in prompt.split()]
        parent: int | None = None
        first_parent = parent
        blocks = []
        for start in range(0, len(tokens) - TOKENS_PER_BLOCK + 1, TOKENS_PER_BLOCK):
            ids = tokens[start : start + TOKENS_PER_BLOCK]
            seed = f"{parent}|{lora_int_id}|{ids}".encode()
            parent = int.from_bytes(hashlib.sha256(seed).digest()[:8], "little")
            named = [{"token_id": one, "token_extra_id": 0} for one in ids]
            told = {"type": "stored_block", "block_hash": parent, "tokens": named}
            blocks.append({**told, "cache_level": 0, "priority": 35})
        if blocks:
            self._event({"type": "stored", "parent_hash": first_parent, "blocks": blocks})

    def _event(self, payload: dict[str, Any]) -> None:
        self._events.append({"event_id": self._next_event, "data": payload, "window_size": 4096})
        self._next_event += 1


def _family(kind: str, name: str, values: dict[str, float]) -> str:
    samples = "".join(
        f"trtllm_{name}{{{labels}{_LABELS}}} {float(value)}\n" for labels, value in values.items()
    )
    return f"# HELP trtllm_{name} {name}\n# TYPE trtllm_{name} {kind}\n{samples}"


def _histogram(name: str, count: int) -> str:
    return (
        f"# TYPE trtllm_{name} histogram\n"
        f'trtllm_{name}_bucket{{le="+Inf",{_LABELS}}} {count}\n'
        f"trtllm_{name}_sum{{{_LABELS}}} 0.0\ntrtllm_{name}_count{{{_LABELS}}} {count}\n"
    )
