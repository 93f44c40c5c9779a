"""vLLM's dialect (0.32; paths below are under `vllm/` in its wheel)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from serving.engines.base import RESPONSES, Dialect, EngineCall
from serving.engines.body_fields import ask_for_usage, decode_fields, encode_fields, raw

if TYPE_CHECKING:
    from serving.config import EngineKind


class Vllm(Dialect):
    """The most like OpenAI: takes every field, and our request id by header.

    Its health route stays 200 while it is paused or draining: only the canary tells.
    """

    kind: EngineKind = "vllm"
    health_path = "/health"
    context_text = re.compile(r"maximum (?:context|model) length|max_model_len|input_tokens")
    default_paths = frozenset(
        {
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/tokenize",
            "/detokenize",
        }
    )

    def lacks_adapter(self, status: int, body: bytes) -> bool:
        """404 of the model; that of a route has no `error` (entrypoints/serve/engine/serving.py)."""
        return status == 404 and b"NotFoundError" in body

    def engine_body(self, body: bytes, call: EngineCall) -> bytes:
        """Names the model, asks for usage, names the response.

        `X-Request-Id` beats the body's `request_id` (entrypoints/serve/engine/serving.py), but
        the Responses API takes its response's id from the body alone
        (entrypoints/openai/responses/protocol.py).
        """
        names_response = call.path == RESPONSES
        is_named = call.engine_name == call.sent_name
        if is_named and not call.add_usage and not names_response:
            return body
        fields = decode_fields(body)
        if not is_named:
            fields["model"] = raw(call.engine_name)
        if call.add_usage:
            ask_for_usage(fields)
        if names_response:
            fields["request_id"] = raw(call.response_id)
        return encode_fields(fields)
