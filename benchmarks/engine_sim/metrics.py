"""The simulated engine's metrics, under vLLM 0.32.0's names, labels and buckets.

Source: vllm/v1/metrics/loggers.py and buckets.py; names as a running server lists them. What the
simulator cannot have (external caches, images) stays at zero. Used by `engine.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from benchmarks.engine_sim.metric_families import Histogram, escaped, header, samples

if TYPE_CHECKING:
    from benchmarks.engine_sim.options import SimOptions
    from benchmarks.engine_sim.scheduler import StepDone
    from benchmarks.engine_sim.sequence import Sequence

CONTENT_TYPE = b"text/plain; version=1.0.0; charset=utf-8"
_LATENCY_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
_MAX_LORA_SETS = 1000

_HISTOGRAMS = {
    "request_prompt_tokens": "Number of prefill tokens processed.",
    "request_generation_tokens": "Number of generation tokens processed.",
    "iteration_tokens_total": "Histogram of number of tokens per engine_step.",
    "request_max_num_generation_tokens": (
        "Histogram of maximum number of requested generation tokens."
    ),
    "request_params_n": "Histogram of the n request parameter.",
    "request_params_max_tokens": "Histogram of the max_tokens request parameter.",
    "time_to_first_token_seconds": "Histogram of time to first token in seconds.",
    "inter_token_latency_seconds": "Histogram of inter-token latency in seconds.",
    "request_time_per_output_token_seconds": (
        "Histogram of time_per_output_token_seconds per request."
    ),
    "e2e_request_latency_seconds": "Histogram of e2e request latency in seconds.",
    "request_queue_time_seconds": "Histogram of time spent in WAITING phase for request.",
    "request_inference_time_seconds": "Histogram of time spent in RUNNING phase for request.",
    "request_prefill_time_seconds": "Histogram of time spent in PREFILL phase for request.",
    "request_decode_time_seconds": "Histogram of time spent in DECODE phase for request.",
    "request_num_preemptions": "Histogram of the number of times a request was preempted.",
    "request_prefill_kv_computed_tokens": (
        "Histogram of new KV tokens computed during prefill (excluding cached tokens)."
    ),
}
_BUCKETS = {
    "iteration_tokens_total": _STEP_TOKENS,
    "request_params_n": (1, 2, 5, 10, 20),
    "request_num_preemptions": (1, 2, 3, 4, 5, 10, 20),
    "time_to_first_token_seconds": _TTFT_S,
    "inter_token_latency_seconds": _ITL_S,
    "request_time_per_output_token_seconds": _ITL_S,
}


def _token_buckets(max_tokens: int) -> tuple[float, ...]:
    """1, 2, 5, 10, … up to the context length."""
    steps = (digit * 10**exponent for exponent in range(9) for digit in (1, 2, 5))
    return tuple(one for one in steps if one <= max_tokens)


class SimMetrics:
    """What has happened in one engine.

    Attributes:
        finished: Sequences by reason.
        rejected: Requests that found the queue full.
        num_prompt_tokens: Of requests whose first token was sampled.
        num_cached_tokens: Of those, found in the cache.
        num_generation_tokens: Tokens sampled.
    """

    def __init__(self, options: SimOptions) -> None:
        """Starts at zero.

        Args:
            options: The engine's; its name and sizes are labels.
        """
        self._options = options
        self._labels = f'engine="0",model_name="{escaped(options.model)}"'
        self.finished: Counter[str] = Counter()
        self.rejected = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generation_tokens = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0
        self._num_preemptions = 0
        self._lora_sets: dict[str, float] = {}
        tokens = _token_buckets(options.max_model_len)
        self._histograms = {
            name: Histogram(_BUCKETS.get(name, _LATENCY_S if name.endswith("_seconds") else tokens))
            for name in _HISTOGRAMS
        }
        # Looked up once: these are observed for every token.
        self._ttft = self._histograms["time_to_first_token_seconds"]
        self._itl = self._histograms["inter_token_latency_seconds"]
        self._step_tokens = self._histograms["iteration_tokens_total"]

    def step(self, step: StepDone) -> None:
        """One step of the engine has ended."""
        self._step_tokens.observe(step.num_tokens)
        self._num_queried_tokens += step.num_queried_tokens
        self._num_hit_tokens += step.num_hit_tokens
        self._num_preemptions += step.num_preempted

    def token(self, sequence: Sequence, number: int, at_s: float) -> None:
        """The sequence's token of this number, counted from 1, was sampled at `at_s`."""
        self.num_generation_tokens += 1
        if number == 1:
            self.num_prompt_tokens += len(sequence.prompt)
            self.num_cached_tokens += sequence.num_cached
            self._ttft.observe(at_s - sequence.arrived_s)
        else:
            self._itl.observe(at_s - sequence.last_token_s)
        sequence.last_token_s = at_s

    def finish(self, sequence: Sequence, n: int, max_tokens: int | None) -> None:
        """A sequence has said everything.

        Args:
            sequence: The one.
            n: How many its request wanted.
            max_tokens: Bound of its request, where it set one.
        """
        self.finished[sequence.finish_reason] += 1
        num_prompt, num_output = len(sequence.prompt), sequence.num_output
        first_s, last_s = sequence.first_token_s, sequence.last_token_s
        decode_s = last_s - first_s
        seen = {
            "request_prompt_tokens": num_prompt,
            "request_generation_tokens": num_output,
            "request_max_num_generation_tokens": num_output,
            "request_params_n": n,
            "request_time_per_output_token_seconds": decode_s / max(1, num_output - 1),
            "e2e_request_latency_seconds": last_s - sequence.arrived_s,
            "request_queue_time_seconds": sequence.scheduled_s - sequence.arrived_s,
            "request_inference_time_seconds": last_s - sequence.scheduled_s,
            "request_prefill_time_seconds": first_s - sequence.scheduled_s,
            "request_decode_time_seconds": decode_s,
            "request_num_preemptions": sequence.num_preemptions,
            "request_prefill_kv_computed_tokens": num_prompt - sequence.num_cached,
        }
        if max_tokens is not None:
            seen["request_params_max_tokens"] = max_tokens
        histograms = self._histograms
        for name, value in seen.items():
            histograms[name].observe(value)

    def note_adapters(self, active: list[str]) -> None:
        """Which adapters the engine works for.

        vLLM puts every active one into both lists, and keeps old sets of labels for ever
        (vllm/v1/metrics/stats.py): so does this, up to a bound.
        """
        names = escaped(",".join(active))
        key = (
            f'max_lora="{self._options.max_loras}",running_lora_adapters="{names}",'
            f'waiting_lora_adapters="{names}"'
        )
        if key in self._lora_sets or len(self._lora_sets) < _MAX_LORA_SETS:
            self._lora_sets[key] = time.time()

    def text(self, num_running: int, num_waiting: int, num_deferred: int, kv_usage: float) -> bytes:
        """The body of `GET /metrics`.

        Args:
            num_running: Sequences in the batch.
            num_waiting: Sequences in the queue.
            num_deferred: Of those, waiting for an adapter's turn.
            kv_usage: Share of the KV cache that is held.
        """
        capacity = num_waiting - num_deferred
        gauges: dict[str, dict[str, float]] = {
            "num_requests_running": {"": num_running},
            "num_requests_waiting": {"": num_waiting},
            "num_requests_waiting_by_reason": {
                'reason="capacity",': capacity,
                'reason="deferred",': num_deferred,
            },
            "engine_sleep_state": {
                'sleep_state="awake",': 1,
                'sleep_state="weights_offloaded",': 0,
                'sleep_state="discard_all",': 0,
            },
            "kv_cache_usage_perc": {"": kv_usage},
        }
        parts = [self._family(name, "gauge", values) for name, values in gauges.items()]
        parts += [
            self._family(f"{name}_total", "counter", values)
            for name, values in self._counters().items()
        ]
        parts.append(self._rejections())
        for name, histogram in self._histograms.items():
            full = f"vllm:{name}"
            parts.append(header(full, "histogram", _HISTOGRAMS[name]))
            parts.append(histogram.text(full, self._labels))
        parts.append(self._lora_text())
        parts.append(self._cache_config())
        return "".join(parts).encode()

    def _family(self, name: str, kind: str, values: dict[str, float]) -> str:
        full = f"vllm:{name}"
        return header(full, kind, name.replace("_", " ")) + samples(full, self._labels, values)

    def _counters(self) -> dict[str, dict[str, float]]:
        computed = self.num_prompt_tokens - self.num_cached_tokens
        return {
            "prefix_cache_queries": {"": self._num_queried_tokens},
            "prefix_cache_hits": {"": self._num_hit_tokens},
            "external_prefix_cache_queries": {"": 0},
            "external_prefix_cache_hits": {"": 0},
            "mm_cache_queries": {"": 0},
            "mm_cache_hits": {"": 0},
            "num_preemptions": {"": self._num_preemptions},
            "prompt_tokens": {"": self.num_prompt_tokens},
            "prompt_tokens_by_source": {
                'source="local_compute",': computed,
                'source="local_cache_hit",': self.num_cached_tokens,
                'source="external_kv_transfer",': 0,
            },
            "prompt_tokens_cached": {"": self.num_cached_tokens},
            "prompt_tokens_cached_by_source": {
                'source="device",': self._num_hit_tokens,
                **{
                    f'source="{one}",': 0 for one in ("host", "p2p", "disk", "external_unspecified")
                },
            },
            "generation_tokens": {"": self.num_generation_tokens},
            "request_success": {
                f'finished_reason="{reason}",': self.finished[reason] for reason in _FINISH_REASONS
            },
        }

    def _rejections(self) -> str:
        name = "vllm:admission_rejections_total"
        values = {'reason="max_num_queued_reqs",': self.rejected}
        values['reason="max_num_queued_tokens",'] = 0
        labels = f'model_name="{escaped(self._options.model)}"'
        text = "Number of admission attempts rejected by a queue limit, by reason."
        return header(name, "counter", text) + samples(name, labels, values)

    def _lora_text(self) -> str:
        name = "vllm:lora_requests_info"
        lines = [f"{name}{{{key}}} {at}\n" for key, at in self._lora_sets.items()]
        return header(name, "gauge", "Running stats on lora requests.") + "".join(lines)

    def _cache_config(self) -> str:
        options, name = self._options, "vllm:cache_config_info"
        labels = (
            f'block_size="{options.block_size}",enable_prefix_caching="True",engine="0",'
            f'num_gpu_blocks="{options.num_blocks}",prefix_caching_hash_algo="sha256"'
        )
        return header(name, "gauge", "Information of the LLMEngine CacheConfig") + (
            f"{name}{{{labels}}} 1.0\n"
        )
