"""The faults and latencies that every dialect server can be told to have."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal


@dataclass
class Switches:
    """What a test can change, at construction and at any time after.

    The faults apply to requests that generate, and last until they are switched off.

    Attributes:
        num_tokens: Length of an answer, unless the request's own bound is smaller.
        latency_s: Before anything of an answer is sent.
        token_interval_s: Between two tokens.
        error_status: Answer with this status, in the engine's own words.
        num_errors: How many times; None for always.
        hang: Send nothing more before or after the head.
        reset: Reset the connection as soon as it is open, or before or after the head.
        die_after_tokens: Reset the connection after this many tokens.
        fail_after_tokens: Fail after this many tokens in the way the engine fails in mid-stream.
        abort_after_tokens: End gracefully after this many tokens, as if the engine had been told to
            abort; 0 is before any text. SGLang only.
        disconnect_s: How late a client's leaving is noticed when the answer is not streamed.
        stream_disconnect_s: The same for streams.
        health_s: How long the health route takes.
    """

    num_tokens: int = 5
    latency_s: float = 0.0
    token_interval_s: float = 0.0
    error_status: int | None = None
    num_errors: int | None = None
    hang: Literal["before_head", "after_head"] | None = None
    reset: Literal["on_connect", "before_head", "after_head"] | None = None
    die_after_tokens: int | None = None
    fail_after_tokens: int | None = None
    abort_after_tokens: int | None = None
    disconnect_s: float = 0.0
    stream_disconnect_s: float = 0.0
    health_s: float = 0.0

    def set(self, **values: object) -> None:
        """Changes switches by name."""
        names = {one.name for one in dataclasses.fields(self)}
        unknown = values.keys() - names
        if unknown:
            raise ValueError(f"no such switch: {sorted(unknown)}; there are {sorted(names)}")
        for name, value in values.items():
            setattr(self, name, value)
