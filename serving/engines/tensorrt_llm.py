"""TensorRT-LLM's dialect (`trtllm-serve`; paths below are of its repository).

Read from several commits of 2026, tied to no release: what depends on one is in this file only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from serving.engines.base import (
    CHAT,
    COMPLETIONS,
    GENERATION_PATHS,
    RESPONSES,
    Dialect,
    EngineCall,
)
from serving.engines.body_fields import ask_for_usage, decode_fields, encode_fields, raw
from serving.engines.error_text import read_error
from serving.engines.response_names import rename_model_and_id
from serving.errors import BadRequest, NotOffered, UpstreamBroken

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import EngineKind
    from serving.engines.base import EngineAdapter
    from serving.engines.body_fields import Fields
    from serving.errors import ServingError

# tensorrt_llm/serve/openai_protocol.py: both request models forbid every other field.
_SHARED = frozenset(
    [
        "model",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "n",
        "presence_penalty",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "user",
        "best_of",
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
        "response_format",
        "prompt_ignore_length",
        "max_tokens",
    ]
)
_KNOWN = {
    CHAT: _SHARED
    | frozenset(
        [
            "messages",
            "top_logprobs",
            "tools",
            "tool_choice",
            "echo",
            "add_generation_prompt",
            "documents",
            "chat_template",
            "chat_template_kwargs",
            "reasoning_effort",
            "cache_salt",
            "mm_processor_kwargs",
        ]
    ),
    COMPLETIONS: _SHARED
    | frozenset(["prompt", "echo", "suffix", "return_context_logits", "detokenize"]),
}
_OUTPUT_CHANGING = frozenset(
    [
        "lora_request",
        "prompt_logprobs",
        "return_token_ids",
        "allowed_token_ids",
        "bad_words",
        "structured_outputs",
        "logits_processors",
        "prompt_embeds",
    ]
)
"""vLLM's extras that change what comes out: dropping one silently would be a wrong answer. And the
engine's own `lora_request`: adapters are selected by `model`, and a path is nothing for clients."""
_NO_ADAPTER = re.compile(rb"Failed to load LoRA|lora_path[^}]*(?:does not exist|not found)", re.I)
_INTERNAL = re.compile(
    r"CppExecutor|RequestError|Failed to load LoRA|CUDA|out of memory|Traceback|internal",
    re.IGNORECASE,
)


class TensorrtLlm(Dialect):
    """Refuses unknown fields, takes no request id but for responses, answers every failure with 400.

    Its streams break off without an error event, give each chunk a new id, and its server never
    checks the model's name. Adapters are named in each request; none are listed.
    """

    kind: EngineKind = "tensorrt-llm"
    health_path = "/health"
    context_text = re.compile(
        r"max_seq_len|max_num_tokens|max_input_len|maximum context length|exceeds? the maximum"
    )
    default_paths = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})

    lists_adapters = False

    def engine_name(self, name: str, parent: str | None) -> str:
        """An adapter's requests name its base model, and the adapter in a field of its own."""
        return name if parent is None else parent

    def lacks_adapter(self, status: int, body: bytes) -> bool:
        """Its folder is gone, or what is in it does not load (executor/request.py, `LoRARequest`)."""
        return status >= 400 and _NO_ADAPTER.search(body) is not None

    def engine_body(self, body: bytes, call: EngineCall) -> bytes:
        """Strips what the engine would refuse and maps what it knows by another name.

        Raises:
            BadRequest: If a field that changes the output has no counterpart.
            NotOffered: If the endpoint cannot name an adapter and one is asked for.
        """
        fields = decode_fields(body)
        fields["model"] = raw(call.engine_name)
        known = _KNOWN.get(call.path)
        if known is None:
            if call.adapter is not None:
                # Without the field the base would answer in the adapter's name.
                raise NotOffered(
                    f"The engine that serves '{call.public_name}' does not offer {call.path} with "
                    "an adapter."
                )
            if call.path == RESPONSES:
                # The one request model that takes an id, and calls the response by it.
                fields["request_id"] = raw(call.response_id)
            return encode_fields(fields)
        # One field under two names: with both, one of them counts as unknown.
        bound = fields.pop("max_completion_tokens", None)
        if bound is not None and bytes(bound) != b"null":
            fields["max_tokens"] = bound
        _map_structured_outputs(fields)
        for name in [name for name in fields if name not in known]:
            if name in _OUTPUT_CHANGING and bytes(fields[name]) not in (b"null", b"false"):
                raise BadRequest(
                    f"The engine that serves '{call.public_name}' does not support '{name}'.",
                    param=name,
                )
            del fields[name]
        if call.add_usage:
            ask_for_usage(fields)
        if call.adapter is not None:
            fields["lora_request"] = _lora_request(call.adapter)
        return encode_fields(fields)

    def rewriter(self, call: EngineCall) -> Callable[[bytes], bytes] | None:
        """One id for all chunks, and ours; the name that the client shall see."""
        if call.path not in GENERATION_PATHS:
            return None
        return rename_model_and_id(call.public_name, call.response_id)

    def to_error(self, status: int, body: bytes, model: str) -> ServingError:
        """A 400 may be the engine's own failure: the text tells, where it does."""
        message, _ = read_error(body)
        if status == 400 and _INTERNAL.search(message) and not self.context_text.search(message):
            return UpstreamBroken("The engine failed while it worked on this request.")
        return super().to_error(status, body, model)


def _lora_request(adapter: EngineAdapter) -> msgspec.Raw:
    """Its cache is keyed by the number alone, which is why every version has its own."""
    return raw(
        {
            "lora_name": adapter.version,
            "lora_int_id": adapter.lora_id,
            "lora_path": adapter.path,
        }
    )


def _map_structured_outputs(fields: Fields) -> None:
    """Puts `structured_outputs` (vLLM's) as the `response_format` that means the same here."""
    wanted = fields.get("structured_outputs")
    if wanted is None or bytes(wanted) == b"null":
        return
    options: Any = msgspec.json.decode(bytes(wanted))
    response_format = _response_format(options) if isinstance(options, dict) else None
    if response_format is not None:
        fields["response_format"] = raw(response_format)
        del fields["structured_outputs"]


def _response_format(options: dict[str, Any]) -> dict[str, Any] | None:
    if options.get("json") is not None:
        schema = options["json"]
        if isinstance(schema, str):
            schema = msgspec.json.decode(schema)
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if options.get("regex") is not None:
        return {"type": "regex", "regex": options["regex"]}
    if options.get("grammar") is not None:
        return {"type": "ebnf", "ebnf": options["grammar"]}
    if options.get("choice") is not None:
        choices = "|".join(re.escape(str(choice)) for choice in options["choice"])
        return {"type": "regex", "regex": f"({choices})"}
    return None
