"""Token counts, read from the bytes of a response without decoding it."""

from __future__ import annotations

import re
from typing import NamedTuple

_COUNT = re.compile(
    rb'"(prompt|input|cache_creation_input|cache_read_input|completion|output)_tokens"\s*:\s*(\d+)'
)
_CACHED = (b"cache_creation_input", b"cache_read_input")
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_USAGE_SPAN_BYTES = 512


class Usage(NamedTuple):
    """Tokens of one request, as the engine counted them."""

    prompt_tokens: int
    completion_tokens: int


def find_usage(payload: bytes) -> Usage | None:
    """The last `usage` object in `payload`, or None.

    OpenAI's names (`prompt_tokens`, `completion_tokens`) and Anthropic's and the Responses
    API's (`input_tokens`, `output_tokens`). Engines write the total first or last, and details
    (`cached_tokens`) nested: only the known names count. Anthropic's `input_tokens` leave out what
    went through the prefix cache: its own two counts are added. Generated text cannot forge a match: in
    a JSON string its quotes are escaped.
    """
    # Engines write no space before the brace; the search without a pattern is ten times faster.
    start = payload.rfind(b'"usage":{')
    if start < 0:
        spaced = list(_USAGE.finditer(payload))
        if not spaced:
            return None
        start = spaced[-1].start()
    prompt = cached = completion = 0
    for name, digits in _COUNT.findall(payload, start, start + _USAGE_SPAN_BYTES):
        if name in (b"prompt", b"input"):
            prompt = int(digits)
        elif name in _CACHED:
            cached += int(digits)
        else:
            completion = int(digits)
    return Usage(prompt + cached, completion)
