"""Anthropic's bodies and events, as SGLang sends them on `/v1/messages`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from base_server import Failure
from responses_wire import named_event

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batch import Generation
    from scripted_engine import Step

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_ERROR_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    503: "overloaded_error",
}


def message_error(status: int, message: str) -> dict[str, Any]:
    """An error."""
    error = {"type": _ERROR_KINDS.get(status, "api_error"), "message": message}
    return {"type": "error", "error": error}


def message_of(generation: Generation, model: str) -> dict[str, Any]:
    """A whole message."""
    counts = generation.usage
    return {
        **_empty(generation, model),
        "content": [{"type": "text", "text": generation.text}],
        "stop_reason": _stop_reason(generation),
        "usage": {
            "input_tokens": counts["prompt_tokens"],
            "output_tokens": counts["completion_tokens"],
        },
    }


def message_events(
    generation: Generation, model: str, tokens: Iterator[str | Step]
) -> Iterator[Step]:
    """The events of a streamed message; what is no token is done between them."""
    yield _event("message_start", message=_empty(generation, model))
    block = {"type": "text", "text": ""}
    yield _event("content_block_start", index=0, content_block=block)
    try:
        for step in tokens:
            if isinstance(step, str):
                delta = {"type": "text_delta", "text": step}
                yield _event("content_block_delta", index=0, delta=delta)
            else:
                yield step
    except Failure as error:
        yield _event("error", error=message_error(500, str(error))["error"])
        return
    yield _event("content_block_stop", index=0)
    ends = {"stop_reason": _stop_reason(generation), "stop_sequence": None}
    usage = {"output_tokens": generation.usage["completion_tokens"]}
    yield _event("message_delta", delta=ends, usage=usage)
    yield _event("message_stop")


def _event(kind: str, **fields: object) -> bytes:
    return named_event(kind, {"type": kind, **fields})


def _stop_reason(generation: Generation) -> str:
    return _STOP_REASONS[generation.finish_reason]


def _empty(generation: Generation, model: str) -> dict[str, Any]:
    return {
        "id": generation.response_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": generation.num_prompt_tokens, "output_tokens": 0},
    }
