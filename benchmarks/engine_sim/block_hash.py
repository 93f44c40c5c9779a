"""vLLM's block hashes (vllm/v1/core/kv_cache_utils.py, `hash_block_tokens`, `sha256`).

A block's hash covers its tokens, the hash of the block before, and what else makes its contents
differ: the adapter in every block, the cache salt in the first.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOW_64_BITS = (1 << 64) - 1


def _hash(value: object) -> bytes:
    return sha256(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)).digest()


NONE_HASH = _hash("vllm-none-hash")
"""Parent of every first block, unless PYTHONHASHSEED is set for vLLM."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What separates the blocks of one request from those of others with the same tokens.

    Attributes:
        adapter: Name and path of the adapter.
        salt: The request's `cache_salt`.
    """

    adapter: tuple[str, str] | None = None
    salt: str | None = None

    def extra_keys(self, index: int) -> tuple[tuple[str, ...], ...] | None:
        """The extra keys of a block, by its place in the request."""
        keys: tuple[tuple[str, ...], ...] = ()
        if self.adapter is not None:
            keys += (("lora", *self.adapter),)
        if self.salt is not None and index == 0:
            keys += (("cache_salt", self.salt),)
        return keys or None

    def published(self, index: int) -> list[str] | None:
        """The same without its tags, as KV events have it."""
        extra = self.extra_keys(index)
        return None if extra is None else [key[1] for key in extra]


NO_KEY = CacheKey()


def block_hash(parent: bytes | None, tokens: Sequence[int], key: CacheKey, index: int) -> bytes:
    """Hash of one full block.

    Args:
        parent: Hash of the block before, None for the first.
        tokens: Its token ids.
        key: Of the request.
        index: Its place in the request.
    """
    return _hash((parent or NONE_HASH, tuple(tokens), key.extra_keys(index)))


def published_hash(full: bytes) -> int:
    """What KV events carry: the low 64 bits, unsigned."""
    return int.from_bytes(full, "big") & _LOW_64_BITS
