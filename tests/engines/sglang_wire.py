"""The bodies of SGLang's answers and errors (0.5.23; sources under `sglang/srt/entrypoints/openai/`).

Pure functions of a generation; used by `sglang_server.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from adapter_weights import choices_of
from responses_wire import CREATED
from scripted_engine import event

if TYPE_CHECKING:
    from batch import Generation

Kind = Literal["chat", "completion"]


class Refused(Exception):
    """A request that ends with an error of its own status."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param


def flat_error(status: int, kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Habit: errors are flat (entrypoints/openai/serving_base.py, `create_error_response`)."""
    return {"object": "error", "message": message, "type": kind, "param": param, "code": status}


def streamed_error(status: int, kind: str, message: str) -> bytes:
    """The error event of a stream, which is nested (`create_streaming_error_response`)."""
    return event({"error": flat_error(status, kind, message)})


def answer(generation: Generation, model: str, kind: Kind) -> dict[str, Any]:
    """A whole answer; `model` is what the client sent."""
    reason = "abort" if generation.is_aborted else generation.finish_reason
    choices = []
    if kind == "completion" and generation.prompts:
        choices = choices_of(generation, {"finish_reason": reason, "matched_stop": None})
    for index in range(0 if choices else generation.num_choices):
        choice: dict[str, Any] = {"index": index}
        if kind == "chat":
            message = {"role": "assistant", "content": generation.text}
            choice["message"] = {**message, "reasoning_content": None, "tool_calls": None}
        else:
            choice["text"] = generation.text
        choices.append({**choice, "logprobs": None, "finish_reason": reason, "matched_stop": None})
    return {
        "id": generation.response_id,
        "object": "chat.completion" if kind == "chat" else "text_completion",
        "created": CREATED,
        "model": model,
        "choices": choices,
        "usage": {**generation.usage, "prompt_tokens_details": None, "reasoning_tokens": 0},
        "metadata": {"weight_version": "default"},
    }


class StreamWire:
    """The events of one stream of chat or text completion.

    Attributes:
        is_continuous: Whether each chunk carries the usage so far. Habit: `continuous_usage_stats`
            does not need `include_usage`.
    """

    def __init__(
        self, generation: Generation, model: str, kind: Kind, *, is_continuous: bool
    ) -> None:
        self._generation = generation
        self._kind = kind
        self.is_continuous = is_continuous
        self._base = {
            "id": generation.response_id,
            "object": "chat.completion.chunk" if kind == "chat" else "text_completion",
            "created": CREATED,
            "model": model,
        }

    def pieces(self, delta: dict[str, Any], reason: str | None = None) -> list[bytes]:
        """One event a choice."""
        usage = self._generation.usage if self.is_continuous else None
        return [
            event({**self._base, "choices": [self._choice(index, delta, reason)], "usage": usage})
            for index in range(self._generation.num_choices)
        ]

    def extra(self, **fields: object) -> bytes:
        """An event without choices: usage, or SGLang's own extension."""
        return event({**self._base, "choices": [], **fields})

    def _choice(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if self._kind == "chat":
            empty = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
            choice["delta"] = empty | delta
        else:
            choice["text"] = delta.get("content", "")
        return {**choice, "logprobs": None, "finish_reason": reason, "matched_stop": None}
