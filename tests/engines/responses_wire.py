"""The Responses API's bodies and events, as the engines that are not vLLM send them.

Only what a router has to see: ids, status, one message of text, usage.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batch import Generation

CREATED = 1_764_000_000


def response_of(generation: Generation, model: str, status: str = "completed") -> dict[str, Any]:
    """The response object."""
    item = {
        "id": f"msg_{generation.response_id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [{"type": "output_text", "text": generation.text, "annotations": []}],
    }
    counts = generation.usage
    usage = {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }
    return {
        "id": generation.response_id,
        "object": "response",
        "created_at": CREATED,
        "model": model,
        "status": status,
        "output": [item] if status == "completed" else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage if status == "completed" else None,
    }


def named_event(kind: str, payload: object) -> bytes:
    """One server-sent event with a name."""
    return f"event: {kind}\ndata: {json.dumps(payload, separators=(',', ':'))}\n\n".encode()


def typed_event(kind: str, number: int, **fields: object) -> bytes:
    """One event; the Responses API names them."""
    return named_event(kind, {"type": kind, "sequence_number": number, **fields})


def delta_event(generation: Generation, number: int, token: str) -> bytes:
    """One token."""
    return typed_event(
        "response.output_text.delta",
        number,
        item_id=f"msg_{generation.response_id}",
        output_index=0,
        content_index=0,
        delta=token,
        logprobs=[],
    )
