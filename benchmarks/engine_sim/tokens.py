"""The simulator's tokenizer: four bytes of UTF-8 are a token, and the other way around.

Prompts that begin alike have tokens that begin alike; nothing is lost on the way there and back.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BYTES_PER_TOKEN = 4


def encode(text: str) -> list[int]:
    """Token ids of a text; the last one is padded with zero bytes."""
    raw = text.encode(errors="replace")
    padded = raw + bytes(-len(raw) % BYTES_PER_TOKEN)
    return memoryview(padded).cast("I").tolist()


def decode(ids: Iterable[int]) -> str:
    """The text of token ids."""
    try:
        raw = b"".join(one.to_bytes(BYTES_PER_TOKEN, "little") for one in ids)
    except OverflowError:
        raise ValueError(f"token ids are below {256**BYTES_PER_TOKEN}") from None
    return raw.replace(b"\0", b"").decode(errors="replace")


@lru_cache(maxsize=256)
def _marker(text: str) -> tuple[int, ...]:
    return tuple(encode(text))


def encode_chat(turns: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the assistant begins to speak.

    Each part begins with a token of its own, so that a conversation that goes on has the tokens that
    its earlier turns had.

    Args:
        turns: Role and content of each message.
    """
    ids: list[int] = []
    for role, content in turns:
        ids += _marker(f"<|im_start|>{role[:64]}\n")
        ids += encode(content)
        ids += _marker("<|im_end|>\n")
    ids += _marker("<|im_start|>assistant\n")
    return ids
