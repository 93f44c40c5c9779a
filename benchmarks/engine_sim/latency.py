"""How long a step of the simulated engine takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latency:
    """The latency model.

    A step that computes P prompt tokens and one token for each of B > 0 decoding requests takes
    `P / prefill_tokens_per_s + (1 + batch_slowdown * (B - 1)) / decode_tokens_per_s` seconds.

    Attributes:
        prefill_tokens_per_s: Rate of prompt tokens; 0 where they take no time.
        decode_tokens_per_s: Rate of one request alone; 0 where it takes no time.
        batch_slowdown: Share by which each further decoding request lengthens the step.
    """

    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    batch_slowdown: float = 0.0

    def step_s(self, num_prefill_tokens: int, num_decoding: int) -> float:
        """Duration of a step in seconds."""
        duration_s = 0.0
        if self.prefill_tokens_per_s:
            duration_s += num_prefill_tokens / self.prefill_tokens_per_s
        if num_decoding and self.decode_tokens_per_s:
            slowdown = 1 + self.batch_slowdown * (num_decoding - 1)
            duration_s += slowdown / self.decode_tokens_per_s
        return duration_s
