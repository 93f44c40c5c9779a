"""How a simulated TensorRT-LLM is started, and what can be switched while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from batch import UNBOUNDED
from switches import Switches


@dataclass
class TensorrtLlmSwitches(Switches):
    """Its own timing and state.

    Attributes:
        is_healthy: False once its executor has failed.
        gives_logprobs: Whether completions have logprobs where they are asked for.
        lora_load_fails: Adapters that are not in its cache cannot be loaded.
    """

    # Both are polled once a second.
    disconnect_s: float = 1.0
    stream_disconnect_s: float = 1.0
    is_healthy: bool = True
    lora_load_fails: bool = False
    gives_logprobs: bool = False


@dataclass
class TensorrtLlmOptions:
    """How it is started.

    Attributes:
        has_lora: Whether there is a `lora_config`; without one `lora_request` is ignored.
        lora_paths: Paths that exist on its machine; None for all.
        max_cpu_loras: Size of the adapter cache.
        return_perf_metrics: Whether `/prometheus/metrics` exists.
        event_buffer_max_size: KV-cache events that are kept.
        continuous_usage_default: What an absent `continuous_usage_stats` means: true in old releases.
    """

    has_lora: bool = True
    lora_paths: frozenset[str] | None = None
    max_cpu_loras: int = 1024
    max_batch_size: int = UNBOUNDED
    max_seq_len: int = 4096
    return_perf_metrics: bool = False
    event_buffer_max_size: int = 0
    continuous_usage_default: bool = False


@dataclass(frozen=True)
class CachedLora:
    """Weights in the adapter cache, as they were when their id was first seen."""

    name: str
    path: str
    contents: str = ""
