"""The bodies of TensorRT-LLM's answers (tensorrt_llm/serve/openai_protocol.py).

Pure functions; used by `tensorrt_llm_server.py`.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Literal

from adapter_weights import choices_of
from responses_wire import CREATED

if TYPE_CHECKING:
    from batch import Generation

Kind = Literal["chat", "completion"]


def new_id(kind: Kind) -> str:
    """Nobody else's."""
    return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"


def piece(
    kind: Kind, index: int, text: str, reason: str | None, role: str | None = None
) -> dict[str, Any]:
    """One choice of a chunk."""
    choice: dict[str, Any] = {"index": index}
    if kind == "chat":
        rest = {"reasoning_content": None, "reasoning": None, "tool_calls": None}
        choice["delta"] = {"role": role, "content": text, **rest}
    else:
        choice["text"] = text
    ends = {"logprobs": None, "finish_reason": reason, "stop_reason": None}
    return {**choice, **ends, "avg_decoded_tokens_per_iter": None}


def answer(generation: Generation, model: str, kind: Kind) -> dict[str, Any]:
    """A whole answer."""
    choices = []
    if kind == "completion" and generation.prompts:
        reason = generation.finish_reason
        choices = choices_of(
            generation,
            {"finish_reason": reason, "stop_reason": None, "disaggregated_params": None},
        )
    for index in range(0 if choices else generation.num_choices):
        choice: dict[str, Any] = {"index": index}
        if kind == "chat":
            message = {"role": "assistant", "content": generation.text}
            rest = {"reasoning_content": None, "reasoning": None, "tool_calls": []}
            choice["message"] = {**message, **rest}
        else:
            choice["text"] = generation.text
        ends = {"logprobs": None, "finish_reason": generation.finish_reason, "stop_reason": None}
        choices.append({**choice, **ends, "disaggregated_params": None})
    return {
        "id": generation.response_id,
        "object": "chat.completion" if kind == "chat" else "text_completion",
        "created": CREATED,
        "model": model,
        "choices": choices,
        "usage": {**generation.usage, "prompt_tokens_details": {"cached_tokens": 0}},
        "prompt_token_ids": None,
    }
