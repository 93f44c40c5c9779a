"""One answer that the simulated engine computes: what it says, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.engine_sim.block_hash import NO_KEY, CacheKey, block_hash
from benchmarks.engine_sim.block_pool import Holding

FinishReason = Literal["stop", "length"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request.

    Attributes:
        prompt: Token ids.
        output: Token ids that it will say; at least one.
        arrived_s: When it was added.
        key: Whose blocks it can share.
        finish_reason: Why it ends where it ends.
        owner: Whoever waits for it; the scheduler does not look.
        num_output: Tokens sampled so far.
        num_computed: Tokens whose KV is in the cache.
        num_cached: Of the prompt, found in the cache at its first admission.
        scheduled_s: When it was first admitted to a batch.
        first_token_s: When its first token was sampled.
        last_token_s: When its latest token was sampled.
        num_preemptions: How often it lost its blocks.
    """

    prompt: list[int]
    output: list[int]
    arrived_s: float
    key: CacheKey = NO_KEY
    finish_reason: FinishReason = "length"
    owner: Any = None
    num_output: int = 0
    num_computed: int = 0
    num_cached: int = 0
    scheduled_s: float = -1.0
    first_token_s: float = -1.0
    last_token_s: float = -1.0
    num_preemptions: int = 0
    is_aborted: bool = False
    holding: Holding = field(default_factory=Holding)
    hashes: list[bytes] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether it has said everything."""
        return self.num_output >= len(self.output)

    @property
    def num_known(self) -> int:
        """Tokens that there are: the prompt and what was sampled."""
        return len(self.prompt) + self.num_output

    def tokens(self, start: int, end: int) -> list[int]:
        """Some of its tokens, prompt first."""
        num_prompt = len(self.prompt)
        if end <= num_prompt:
            return self.prompt[start:end]
        said = self.output[max(0, start - num_prompt) : end - num_prompt]
        return self.prompt[start:] + said

    def hash_until(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of its first blocks; computed once."""
        hashes = self.hashes
        for index in range(len(hashes), num_blocks):
            tokens = self.tokens(index * block_size, (index + 1) * block_size)
            parent = hashes[-1] if hashes else None
            hashes.append(block_hash(parent, tokens, self.key, index))
        return hashes[:num_blocks]
