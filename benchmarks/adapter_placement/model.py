"""The constants of the simulated fleet, and where each comes from.

Owns them and the formulas that use one alone. Used by everything in this package.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.engine_sim.latency import Latency
from benchmarks.engine_sim.options import SimOptions

_ENGINE = SimOptions()

LATENCY = Latency(
    prefill_tokens_per_s=_ENGINE.prefill_tokens_per_s,
    decode_tokens_per_s=_ENGINE.decode_tokens_per_s,
    batch_slowdown=_ENGINE.batch_slowdown,
)
"""The engine simulator's: an 8B model on one GPU."""
MAX_NUM_SEQS = _ENGINE.max_num_seqs
MAX_BATCHED_TOKENS = _ENGINE.max_num_batched_tokens

NUM_VERSIONS = 500
NUM_REPLICAS = 8
GPU_SLOTS = 16
"""vLLM's `max_loras`."""
MAX_REGISTERED = 32
"""vLLM's `max_cpu_loras`."""

BASE_BYTES = 16_000_000_000
"""8B parameters in bfloat16."""
BYTES_PER_RANK = 5_242_880
"""LoRA on all linear layers of Llama 3 8B: 2.6 million parameters a rank, in bfloat16."""
RANKS = (8, 16, 32, 64)
RANK_WEIGHTS = (0.3, 0.4, 0.2, 0.1)
"""An assumption: 16 is PEFT users' usual choice, larger ones are rarer."""

LOAD_FIXED_S = 0.1
LOAD_BYTES_PER_S = 500_000_000
"""From a node's disk, where the store has put the files before; an assumption: 0.18 s (rank 8) to
0.77 s (rank 64). `load_scale` multiplies both; a production trace of loads from remote storage has a
median of 4.4 s (GenTD26, Alibaba, 27,415 loads)."""
ACTIVATE_FIXED_S = 0.002
ACTIVATE_BYTES_PER_S = 12_000_000_000
"""Host memory to GPU over PCIe 4.0 x16, half of its nominal rate; the batch waits for it."""

PROMPT_MEDIAN_TOKENS, PROMPT_SIGMA = 1020, 0.5
OUTPUT_MEDIAN_TOKENS, OUTPUT_SIGMA = 129, 0.99
"""Log-normal with the medians and means of Azure's 2023 conversation trace (1,155 and 211 tokens;
Patel et al., "Splitwise", ISCA 2024)."""
EXPECTED_OUTPUT_TOKENS = 211
"""What a router takes for the length of an answer, which it cannot know."""


class Version(NamedTuple):
    """One adapter."""

    name: str
    rank: int
    size_bytes: int
    load_s: float

    @property
    def batch_share(self) -> float:
        """How much longer a decode step is with it in the batch, as a share of one request's step.

        A step is bound by memory traffic: it reads the base model once and each adapter once.
        """
        return self.size_bytes / BASE_BYTES

    @property
    def activate_s(self) -> float:
        """From host memory into a GPU slot."""
        return ACTIVATE_FIXED_S + self.size_bytes / ACTIVATE_BYTES_PER_S


def make_version(number: int, rank: int, load_scale: float) -> Version:
    """An adapter of some rank.

    Args:
        number: Its index.
        rank: LoRA rank.
        load_scale: Factor on the load time.
    """
    size_bytes = rank * BYTES_PER_RANK
    load_s = (LOAD_FIXED_S + size_bytes / LOAD_BYTES_PER_S) * load_scale
    return Version(f"v{number:04d}", rank, size_bytes, load_s)
