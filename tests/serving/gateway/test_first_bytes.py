"""Failures that an engine hides in the first bytes of a 200."""

from __future__ import annotations

import json

import pytest
from scripted_engine import event

from serving.engines import dialect_of
from serving.gateway.first_bytes import early_failure, is_decided

ROLE = event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
TEXT = event({"choices": [{"delta": {"content": "a"}, "finish_reason": None}]})
BOTH = event({"choices": [{"delta": {"role": "assistant", "content": "a"}}]})
ABORT = event({"choices": [{"delta": {}, "finish_reason": "abort"}]})
ERROR = event({"error": {"message": "full", "type": "SERVICE_UNAVAILABLE", "code": 503}})
CLAUDE = b"event: error\n" + event({"type": "error", "error": {"type": "x", "message": "y"}})
NO_ERROR = event({"response": {"error": None}})
ANSWER = json.dumps(
    {"choices": [{"message": {"content": "a"}, "finish_reason": "abort"}]}, separators=(",", ":")
).encode()
ABORTED = ANSWER.replace(b'"a"', b'""')
FORGED = event({"choices": [{"text": '"finish_reason":"abort"', "finish_reason": None}]})


@pytest.mark.parametrize(
    ("first", "decided"),
    [
        (b"", False),
        (b"data: half", False),
        (ROLE, False),
        (ROLE + ROLE[:-1], False),
        (ROLE + TEXT, True),
        (ROLE + ROLE, False),
        (BOTH, True),
        (TEXT, True),
        (ROLE + ABORT, True),
        (ERROR, True),
        (b": keep-alive\n\n", True),
        (b"data: [DONE]\n\n", True),
    ],
)
def test_decided(first: bytes, decided: bool) -> None:
    """A role alone tells nothing yet; whatever whole event comes beside it does."""
    assert is_decided(first) is decided


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (ROLE + TEXT, None),
        (TEXT + ERROR, None),
        (TEXT + ABORT, None),
        (BOTH + ABORT, None),
        (NO_ERROR, None),
        (FORGED, None),
        (ANSWER, None),
        (ERROR, 503),
        (ROLE + ERROR, 503),
        (CLAUDE, 502),
        (ABORT, 502),
        (ROLE + ABORT, 502),
        (ABORTED, 502),
    ],
)
def test_failure(first: bytes, status: int | None) -> None:
    """An error or an abort before any text is a failure that can be retried; after it, it is not."""
    failure = early_failure(dialect_of("sglang"), first, "m")
    assert (None if failure is None else failure.status) == status
    assert failure is None or failure.retryable
