"""What a simulated engine can be told; flags of `headrace bench engine`, by vLLM's names where it has them."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SimOptions(BaseModel):
    """One engine. Rates of 0 mean that the work takes no time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "sim-model"
    """Name of the base model."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """LoRA adapters that are loaded at the start: name → path."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=9001, ge=0, le=65_535)
    """Port to listen on; 0 for any."""
    prefill_tokens_per_s: float = Field(default=20_000.0, ge=0)
    """Prompt tokens that the engine computes a second, for all requests together."""
    decode_tokens_per_s: float = Field(default=60.0, ge=0)
    """Tokens that a request alone in the batch gets a second."""
    batch_slowdown: float = Field(default=0.01, ge=0)
    """How much longer a decode step takes for each further request in it, as a share."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Requests in one batch."""
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    """Tokens computed in one step: long prompts are cut into chunks of it."""
    max_num_queued_reqs: int | None = Field(default=None, ge=1)
    """Unfinished requests beyond which new ones get 503; None for no limit, as in vLLM."""
    max_model_len: int = Field(default=8192, ge=1)
    """Context length in tokens."""
    kv_cache_tokens: int = Field(default=262_144, ge=1)
    """Capacity of the KV cache in tokens."""
    block_size: int = Field(default=16, ge=1)
    """Tokens of one block of it."""
    max_loras: int = Field(default=8, ge=1)
    """Adapters in one batch."""
    answer_tokens: int = Field(default=128, ge=1)
    """Where a model would stop by itself: length of answers that are not bounded sooner."""
    kv_events: str | None = None
    """Endpoint to publish KV events on (tcp://*:5557); None to publish none."""
    kv_events_replay: str | None = None
    """Endpoint that replays them."""
    check_lora_paths: bool = True
    """Whether loading an adapter from a path that does not exist is refused, as in vLLM."""
    seed: int = 0
    """Of what it says."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_model_len > self.kv_cache_tokens // self.block_size * self.block_size:
            raise ValueError(
                "kv_cache_tokens must hold one request of max_model_len tokens: raise the one or "
                "lower the other"
            )
        if self.kv_events_replay is not None and self.kv_events is None:
            raise ValueError("kv_events_replay needs kv_events")
        return self

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.kv_cache_tokens // self.block_size
