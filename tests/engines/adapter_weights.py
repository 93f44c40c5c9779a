"""What a dialect server's adapters are made of, and what that makes them say.

Owns the rule that answers follow an adapter's file contents and nothing else: the same files under
another name or path say the same, other files under the same name do not. So a probe can tell
versions apart, and weights that answer in another's name.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speech import say

if TYPE_CHECKING:
    from batch import Generation


def contents_of(path: str) -> str:
    """A digest of the files in a folder; the path itself where there is none."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def prompts_of(body: dict[str, Any]) -> tuple[str, ...]:
    """The prompts of a text completion that has several; empty for all else."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt):
        return tuple(prompt)
    return ()


def top_logprobs(contents: str, prompt: str, num: int) -> dict[str, float]:
    """The most probable next tokens by these weights."""
    seed = hashlib.sha256(f"{contents}|{prompt}".encode()).digest()
    weights = [1.0 + seed[number] for number in range(num)]
    rest = 1.1 * sum(weights)
    return {
        f" w{seed[8 + n] % 12}-{n}": math.log(weight / rest) for n, weight in enumerate(weights)
    }


def choices_of(generation: Generation, ends: dict[str, Any]) -> list[dict[str, Any]]:
    """One choice a prompt; `ends` has what is the same for all of an engine's choices."""
    choices = []
    for index, prompt in enumerate(generation.prompts):
        tokens = say(generation.contents, None, prompt, generation.num_sent)
        logprobs = None
        if generation.num_logprobs:
            tops = top_logprobs(generation.contents, prompt, generation.num_logprobs)
            best = max(tops, key=lambda token: tops[token])
            logprobs = {
                "tokens": [best],
                "token_logprobs": [tops[best]],
                "top_logprobs": [tops],
                "text_offset": [-1],
            }
        choices.append({"index": index, "text": "".join(tokens), **ends, "logprobs": logprobs})
    return choices
