"""What the simulated engine says: the adapter's name, then words of one token each."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from benchmarks.engine_sim.tokens import BYTES_PER_TOKEN, decode, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

WORDS = (
    " the",
    " dam",
    " oat",
    " rye",
    " wet",
    " run",
    " sun",
    " mud",
    " ice",
    " low",
    " big",
    " eel",
)
WORD_IDS = tuple(encode(word)[0] for word in WORDS)
_ROUNDS = 4096
_TEXTS: dict[int, str] = dict(zip(WORD_IDS, WORDS, strict=True))


class Speech:
    """Says things. Deterministic by seed, adapter and prompt."""

    def __init__(self, seed: int) -> None:
        """Prepares its words.

        Args:
            seed: Of what it says.
        """
        self._stream = Random(seed).choices(WORD_IDS, k=_ROUNDS)  # noqa: S311
        self._greetings: dict[str, list[int]] = {}

    def tokens(
        self, adapter: str | None, prompt: Sequence[int], choice: int, num_tokens: int
    ) -> list[int]:
        """An answer of so many tokens; an adapter's begins with its name, as far as there is room.

        Args:
            adapter: Name of the weights, or None for the base model's.
            prompt: Token ids.
            choice: Which of several answers.
            num_tokens: Its length.
        """
        said = [] if adapter is None else self._greeting(adapter)[:num_tokens]
        start = (hash((*prompt[-8:], len(prompt))) + 7 * choice) % _ROUNDS
        rest = num_tokens - len(said)
        while rest > 0:
            piece = self._stream[start : start + rest]
            said += piece
            rest -= len(piece)
            start = 0
        return said

    def _greeting(self, adapter: str) -> list[int]:
        found = self._greetings.get(adapter)
        if found is None:
            name = ascii(adapter)[1:-1]
            found = encode(name + " " * (-len(name) % BYTES_PER_TOKEN))
            if len(self._greetings) < _ROUNDS:
                self._greetings[adapter] = found
        return list(found)


def text_of(token: int) -> str:
    """One token's text."""
    return _TEXTS.get(token) or decode((token,))
