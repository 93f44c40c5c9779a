"""The simulated engine's block hashes are vLLM's."""

import pytest

from benchmarks.engine_sim.block_hash import CacheKey, block_hash, published_hash

LORA = ("la", "/adapters/la")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (CacheKey(), [10429158316690216413, 5745192707610611011]),
        (CacheKey(LORA, "s"), [11698528910717297018, 11919457805903125970]),
        (CacheKey(None, "s"), [12447238380120047565, 17893195590753513371]),
    ],
)
def test_equals_vllm(key, expected):
    """Values of vLLM 0.32.0's `hash_block_tokens` with sha256, for tokens 0 to 7 in blocks of 4."""
    parent, published = None, []
    for index in range(2):
        parent = block_hash(parent, range(4 * index, 4 * index + 4), key, index)
        published.append(published_hash(parent))
    assert published == expected


def test_published_keys_are_untagged():
    """KV events name adapter and salt in the first block, the adapter alone in the others."""
    key = CacheKey(LORA, "s")
    assert [key.published(0), key.published(1)] == [["la", "s"], ["la"]]
    assert CacheKey().published(0) is None
