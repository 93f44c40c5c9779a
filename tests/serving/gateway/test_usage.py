"""Token counts out of raw bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.usage import Usage, find_usage

_counts = st.integers(0, 10**9)


@given(
    prompt=_counts,
    completion=_counts,
    details=st.dictionaries(st.sampled_from(["cached_tokens", "audio_tokens"]), _counts),
    before=st.text(max_size=50),
    is_compact=st.booleans(),
    names=st.sampled_from([("prompt", "completion"), ("input", "output")]),
)
def test_counts_are_found(
    prompt: int,
    completion: int,
    details: dict[str, int],
    before: str,
    is_compact: bool,
    names: tuple[str, str],
) -> None:
    """Whatever text is before, however it is spaced, with details nested or not."""
    usage = {
        f"{names[0]}_tokens": prompt,
        "total_tokens": prompt + completion,
        f"{names[0]}_tokens_details": details,
        f"{names[1]}_tokens": completion,
    }
    separators = (",", ":") if is_compact else (", ", ": ")
    payload = json.dumps({"text": before, "usage": usage}, separators=separators).encode()
    assert find_usage(payload) == Usage(prompt, completion)


@given(st.text())
def test_text_cannot_forge_usage(text: str) -> None:
    """A string's quotes are escaped."""
    forged = '"usage":{"prompt_tokens":5,"completion_tokens":5}' + text
    assert find_usage(json.dumps({"text": forged}).encode()) is None


@pytest.mark.parametrize("payload", [b"", b"{}", b'{"usage":null}', b"data: [DONE]\n\n"])
def test_no_usage(payload: bytes) -> None:
    """None where there is none."""
    assert find_usage(payload) is None


def test_the_last_usage_counts() -> None:
    """Streams with continuous usage name it in each event."""
    one = b'data: {"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n'
    assert find_usage(one % 1 + one % 2) == Usage(3, 2)


def test_counts_beside_the_usage_are_not_its() -> None:
    """Fields before the object do not count."""
    payload = (
        b'{"max_output_tokens":99,"input_tokens":1,"usage":{"input_tokens":2,"output_tokens":4}}'
    )
    assert find_usage(payload) == Usage(2, 4)
