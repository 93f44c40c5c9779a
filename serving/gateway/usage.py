"""Token counts, read from the bytes of a response without decoding it."""

from __future__ import annotations

import re
from typing import NamedTuple

_COUNT = re.compile(rb'"(prompt|input|completion|output)_tokens"\s*:\s*(\d+)')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_USAGE_SPAN_BYTES = 1024


class Usage(NamedTuple):
    """Tokens of one request, as the engine counted them."""

    prompt_tokens: int
    completion_tokens: int


def find_usage(payload: bytes) -> Usage | None:
    """The last `usage` object in `payload`, or None.

    OpenAI's names (`prompt_tokens`, `completion_tokens`) and Anthropic's and the Responses
    API's (`input_tokens`, `output_tokens`). Engines write the total first or last, and details
    (`cached_tokens`) nested: only the four names count. Generated text cannot forge a match: in
    a JSON string its quotes are escaped.
    """
    start = -1
    for match in _USAGE.finditer(payload):
        start = match.end()
    if start < 0:
        return None
    prompt = completion = 0
    for name, digits in _COUNT.findall(payload, start, start + _USAGE_SPAN_BYTES):
        if name in (b"prompt", b"input"):
            prompt = int(digits)
        else:
            completion = int(digits)
    return Usage(prompt, completion)
