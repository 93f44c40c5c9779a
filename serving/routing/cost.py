"""What a request will cost its replica, estimated before it is sent."""

from __future__ import annotations

BYTES_PER_TOKEN = 4
"""English text under common BPE vocabularies has 4 characters a token (OpenAI, "Tokens"); JSON
around the messages makes the estimate err to the high side, the same way for every replica."""

DEFAULT_COMPLETION_TOKENS = 256
"""For requests that set no bound. Azure's 2023 conversation trace has a median of 129 and a mean
of 211 generated tokens (Patel et al., "Splitwise", ISCA 2024)."""

MAX_COMPLETION_TOKENS = 4096
"""A bound in a request is a ceiling that few reach: beyond this it says nothing about the cost."""


def estimate_tokens(body_bytes: int, max_completion_tokens: int | None, num_choices: int) -> int:
    """Prompt and completion tokens that a request will occupy its replica with.

    Args:
        body_bytes: Size of the JSON body.
        max_completion_tokens: The request's own bound, or None.
        num_choices: `n`: completions of the one prompt.

    Returns:
        At least 1.
    """
    if max_completion_tokens is None:
        completion = DEFAULT_COMPLETION_TOKENS
    else:
        completion = min(max(max_completion_tokens, 0), MAX_COMPLETION_TOKENS)
    return 1 + body_bytes // BYTES_PER_TOKEN + completion * max(num_choices, 1)
