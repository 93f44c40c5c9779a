"""How a simulated SGLang is started, and what can be switched while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from batch import UNBOUNDED
from switches import Switches


@dataclass
class SglangSwitches(Switches):
    """SGLang's own timing, and its state.

    Attributes:
        sends_sglext_ids: Streams of chat and completions have a named event (`event: sglext_ids`).
        is_healthy: False while starting or broken.
        lora_load_error: What it says to loads in place of loading.
        lora_load_hangs: Loads are not answered.
        is_draining: SIGTERM has come: only health flips, requests are still taken.
    """

    # SGLANG_REQUEST_STATE_WAIT_TIMEOUT; streams by a background task; one token, never below 1 s.
    disconnect_s: float = 4.0
    stream_disconnect_s: float = 2.0
    health_s: float = 1.0
    sends_sglext_ids: bool = False
    is_healthy: bool = True
    is_draining: bool = False
    lora_load_error: str | None = None
    lora_load_hangs: bool = False


@dataclass
class SglangOptions:
    """Its launch flags, by their names there.

    Attributes:
        lora_paths: Adapters loaded at the start.
        checks_lora_paths: Whether an adapter's folder has to exist.
    """

    lora_paths: dict[str, str] | None = None
    enable_lora: bool = True
    max_loras_per_batch: int = 8
    max_loaded_loras: int | None = None
    checks_lora_paths: bool = False
    enable_metrics: bool = False
    max_running_requests: int = UNBOUNDED
    max_queued_requests: int | None = None
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False
    abort_on_priority_when_disabled: bool = False
    stream_response_default_include_usage: bool = False
    context_length: int = 4096
    allow_auto_truncate: bool = False
    dp_size: int = 1
    api_key: str | None = None
    admin_api_key: str | None = None
    kv_events_port: int | None = None
