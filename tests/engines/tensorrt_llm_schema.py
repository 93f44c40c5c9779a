"""Which fields TensorRT-LLM takes, and how it says that it does not take one.

Source: tensorrt_llm/serve/openai_protocol.py, whose models have `extra="forbid"`. `priority`, which some
2026 commits take and others do not, is refused here, as are `request_id` and `rid`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from scripted_engine import Seen

Endpoint = Literal["chat", "completion", "responses"]

_SAMPLING = frozenset(
    [
        "best_of",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "n",
        "presence_penalty",
        "response_format",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "user",
        "lora_request",
        "prompt_ignore_length",
        "use_beam_search",
        "top_k",
        "top_p_min",
        "min_p",
        "repetition_penalty",
        "length_penalty",
        "early_stopping",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "truncate_prompt_tokens",
        "add_special_tokens",
        "echo",
        "disaggregated_params",
        "conversation_params",
    ]
)
FIELDS: dict[Endpoint, frozenset[str]] = {
    "chat": _SAMPLING
    | frozenset(
        [
            "messages",
            "prompt_token_ids",
            "model",
            "top_logprobs",
            "max_completion_tokens",
            "tools",
            "tool_choice",
            "reasoning_effort",
            "add_generation_prompt",
            "documents",
            "chat_template",
            "chat_template_kwargs",
            "media_io_kwargs",
            "mm_processor_kwargs",
            "cache_salt",
            "agent_hierarchy",
        ]
    ),
    "completion": _SAMPLING
    | frozenset(["model", "prompt", "suffix", "return_context_logits", "detokenize"]),
    "responses": frozenset(
        [
            "background",
            "include",
            "input",
            "instructions",
            "max_output_tokens",
            "max_tool_calls",
            "metadata",
            "model",
            "parallel_tool_calls",
            "previous_response_id",
            "prompt",
            "reasoning",
            "request_id",
            "service_tier",
            "store",
            "stream",
            "temperature",
            "text",
            "tool_choice",
            "tools",
            "top_logprobs",
            "top_p",
            "truncation",
            "user",
        ]
    ),
}
_REQUIRED: dict[Endpoint, tuple[str, ...]] = {
    "chat": ("messages", "model"),
    "completion": ("model", "prompt"),
    "responses": ("input", "model"),
}
_STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats"})
_LORA_REQUEST = frozenset({"lora_name", "lora_int_id", "lora_path", "lora_ckpt_source"})


class SchemaError(Exception):
    """The body does not fit the schema; the text is what the client gets."""


def checked(seen: Seen, endpoint: Endpoint) -> dict[str, Any]:
    """The decoded body.

    Raises:
        SchemaError: If a field is missing, or is one that the schema does not know.
    """
    try:
        body = json.loads(seen.body)
    except ValueError as error:
        raise SchemaError(_problem("json_invalid", (), f"JSON decode error: {error}")) from None
    if not isinstance(body, dict):
        raise SchemaError(_problem("dict_type", (), "Input should be a valid dictionary"))
    for name in _REQUIRED[endpoint]:
        if name not in body:
            raise SchemaError(_problem("missing", (name,), "Field required"))
    _forbid(body, FIELDS[endpoint])
    if isinstance(body.get("stream_options"), dict):
        _forbid(body["stream_options"], _STREAM_OPTIONS, "stream_options")
    if isinstance(body.get("lora_request"), dict):
        _forbid(body["lora_request"], _LORA_REQUEST, "lora_request")
    if body.get("stream_options") and not body.get("stream"):
        message = "Value error, Stream options can only be defined when stream is true."
        raise SchemaError(_problem("value_error", (), message))
    return body


def _forbid(given: dict[str, Any], known: frozenset[str], *place: str) -> None:
    for name in given:
        if name not in known:
            message = "Extra inputs are not permitted"
            raise SchemaError(_problem("extra_forbidden", (*place, name), message))


def _problem(kind: str, place: tuple[str, ...], message: str) -> str:
    return str([{"type": kind, "loc": ("body", *place), "msg": message}])
