"""SGLang's dialect (0.5.23; paths below are under `sglang/srt/` in its wheel)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from serving.engines.base import RESPONSES, Dialect, EngineCall
from serving.engines.body_fields import ask_for_usage, decode_fields, encode_fields, raw
from serving.engines.response_names import rename_model
from serving.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import EngineKind
    from serving.engines.body_fields import Fields


class Sglang(Dialect):
    """Flat errors, adapters as `base:adapter`, our id as `rid`, priority the other way round.

    It answers unknown models from the base and a full queue with an error event under a 200; the
    gateway refuses the one by itself and reads the first event before it answers because of the other.
    """

    kind: EngineKind = "sglang"
    health_path = "/ready"  # `/health` generates and takes a second or more
    own_event_mark: bytes | None = b"event: sglext_"
    context_text = re.compile(
        r"context length|longer than the model|max_req_input_len", re.IGNORECASE
    )
    adapter_slots = 7
    """Of `max_loras_per_batch` (8), which counts the base model."""
    default_paths = frozenset(
        {
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/embeddings",
            "/v1/responses",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/score",
            "/v1/rerank",
            "/tokenize",
            "/detokenize",
        }
    )

    def engine_name(self, name: str, parent: str | None) -> str:
        """A bare adapter name would silently be answered by the base (managers/…/lora)."""
        return name if parent is None else f"{parent}:{name}"

    def lacks_adapter(self, status: int, body: bytes) -> bool:
        """400 for one that was never loaded (lora/lora_registry.py); an unloaded one is loaded again."""
        return status == 400 and (
            b"requested LoRA adapters are not loaded" in body or b"LoRA is not enabled" in body
        )

    def engine_body(self, body: bytes, call: EngineCall) -> bytes:
        """Names the model, our id as `rid`, asks for usage, turns the priority round.

        `rid`s are of one length, so that none is the prefix of another: `/abort_request` aborts
        whatever begins with what it is given (managers/scheduler.py).

        Raises:
            BadRequest: If it names an adapter past the names that we check.
        """
        fields = decode_fields(body)
        lora_path = fields.pop("lora_path", None)
        if lora_path is not None and bytes(lora_path) != b"null":
            raise BadRequest(
                "Adapters are selected by 'model', not by 'lora_path'.", param="lora_path"
            )
        fields["model"] = raw(call.engine_name)
        fields["rid"] = raw(call.response_id)
        if call.path == RESPONSES:
            # Its protocol names the response by another field (entrypoints/openai/protocol.py).
            fields["request_id"] = fields["rid"]
        if call.add_usage:
            ask_for_usage(fields)
        _turn_priority(fields)
        return encode_fields(fields)

    def rewriter(self, call: EngineCall) -> Callable[[bytes], bytes] | None:
        """Adapters are answered under `base:adapter`; everything else passes."""
        if call.engine_name == call.public_name or ":" not in call.engine_name:
            return None
        return rename_model(call.public_name)


def _turn_priority(fields: Fields) -> None:
    """Clients say it as vLLM does, lower first; here higher is first (S: priority scheduling)."""
    priority = fields.get("priority")
    if priority is None:
        return
    text = bytes(priority).decode()
    if re.fullmatch(r"-?\d+", text):
        fields["priority"] = raw(-int(text))
