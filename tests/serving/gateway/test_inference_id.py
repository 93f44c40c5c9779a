"""Inference ids."""

from __future__ import annotations

import time
import uuid

from serving.gateway.inference_id import InferenceIds


def test_ids_are_uuid7() -> None:
    """Version, variant and time are where RFC 9562 wants them."""
    ids = InferenceIds()
    before_ms = time.time_ns() // 1_000_000
    made = [ids.next() for _ in range(2_000)]
    after_ms = time.time_ns() // 1_000_000
    for one in made:
        parsed = uuid.UUID(one.decode())
        assert (len(one), one, parsed.version, parsed.variant) == (
            32,
            one.lower(),
            7,
            uuid.RFC_4122,
        )
        assert before_ms <= parsed.int >> 80 <= after_ms


def test_ids_differ() -> None:
    """Within one millisecond, across blocks of random bytes, and from maker to maker."""
    makers = [InferenceIds(), InferenceIds()]
    made = [maker.next() for maker in makers for _ in range(5_000)]
    assert len(set(made)) == len(made)
    tails = {one[16:] for one in made}
    assert len(tails) == len(made)


def test_random_bits_vary() -> None:
    """Every one of the 74 random bits is now 0 and now 1."""
    made = [int(InferenceIds().next(), 16) for _ in range(500)]
    ones, zeros = 0, 0
    for value in made:
        ones |= value
        zeros |= ~value
    random_bits = ((1 << 12) - 1) << 64 | (1 << 62) - 1
    assert ones & zeros & random_bits == random_bits
