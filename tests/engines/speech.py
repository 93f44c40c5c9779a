"""What simulated weights say: text that proves which weights answered, and how long it is."""

from __future__ import annotations

import hashlib
from typing import Any

_WORDS = ("mill", "wheel", "water", "race", "stone", "grain", "flour", "sluice")


def prompt_of(body: dict[str, Any]) -> str:
    """The text of a request's prompt, whatever the endpoint."""
    if "messages" in body:
        return "\n".join(_text(message.get("content")) for message in body["messages"])
    return _text(body.get("prompt", body.get("input", body.get("text"))))


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(_text(part) for part in content)
    if isinstance(content, dict):
        return _text(content.get("text", content.get("content", "")))
    return "" if content is None else str(content)


def count_tokens(text: str) -> int:
    """How long the engine takes a text to be: its words, and one for the template."""
    return len(text.split()) + 1


def say(weights: str, source: str | None, prompt: str, num_tokens: int) -> tuple[str, ...]:
    """What these weights say to a prompt: their name, where they came from, and words.

    Deterministic, and different for every name, source and prompt: it proves which weights
    answered.
    """
    told = [weights] + ([f" from {source}"] if source else [])
    seed = f"{weights}|{source}|{prompt}"
    for number in range(len(told), num_tokens):
        digest = hashlib.sha256(f"{seed}|{number}".encode()).digest()
        told.append(f" {_WORDS[digest[0] % len(_WORDS)]}")
    return tuple(told[:num_tokens])
