"""What SGLang makes of a request before it generates: names, ids, bounds, priority, the queue.

Most of its bad habits are here, each marked `Habit:` (0.5.23; sources under `sglang/srt/`).
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

from adapter_weights import prompts_of
from batch import Generation
from sglang_loras import LoadedLora, LoraRefused
from sglang_wire import Refused
from speech import count_tokens, prompt_of, say

if TYPE_CHECKING:
    from batch import Batch
    from scripted_engine import Seen
    from sglang_loras import SglangLoras
    from sglang_options import SglangOptions, SglangSwitches

QUEUE_FULL = "The request queue is full."
EVICTED = "The request is aborted by a higher priority request."


class SglangAdmission:
    """The checks of one server."""

    def __init__(
        self,
        model: str,
        options: SglangOptions,
        switches: SglangSwitches,
        loras: SglangLoras,
        batch: Batch,
    ) -> None:
        self._model = model
        self._options = options
        self._switches = switches
        self._loras = loras
        self._batch = batch

    def body(self, seen: Seen) -> dict[str, Any]:
        """The decoded body.

        Raises:
            Refused: If it is not a JSON object.
        """
        if not seen.headers.get("content-type", "application/json").startswith("application/json"):
            raise Refused(400, "Bad Request", "Unsupported Media Type: Only 'application/json'")
        try:
            body = json.loads(seen.body)
        except ValueError as error:
            raise Refused(400, "Bad Request", f"JSON decode error: {error}") from None
        if not isinstance(body, dict):
            raise Refused(400, "Bad Request", "Input should be a valid dictionary", "body")
        # Habit: fields that it does not know are ignored (pydantic's default): nothing to do.
        return body

    def _adapter_name(self, body: dict[str, Any]) -> str | None:
        """Habits of naming (entrypoints/openai/serving_base.py, `_parse_model_parameter`).

        - The model's name is not checked: unknown ones are answered by the base model.
        - `base:adapter` selects an adapter, and beats `lora_path`.
        - Any other string with a ':' is split as well.
        - An adapter's bare name is an unknown model: the base answers, silently.
        """
        _, separator, adapter = str(body.get("model", "")).partition(":")
        if separator and adapter.strip():
            return adapter.strip()
        lora_path = body.get("lora_path")
        return str(lora_path) if lora_path else None

    def _weights(self, body: dict[str, Any]) -> LoadedLora | None:
        name = self._adapter_name(body)
        if name is None:
            return None
        try:
            return self._loras.find(name)
        except LoraRefused as error:
            raise Refused(400, "BadRequestError", str(error)) from None

    def admit(self, body: dict[str, Any], *, id_field: str = "rid") -> Generation:
        """Checks a request and writes down what it will say.

        Raises:
            Refused: With the status that SGLang gives.
        """
        rid = str(body.get(id_field) or uuid.uuid4().hex)
        # Habit: `rid` is the response's id, and one in flight cannot be used again.
        if any(one.response_id == rid for one in self._batch.everybody):
            raise Refused(400, "BadRequestError", f"Duplicate request ID detected: {rid}")
        lora = self._weights(body)
        prompt = prompt_of(body)
        num_prompt_tokens = self._checked_length(prompt)
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        limit = limit or body.get("max_output_tokens") or 1 << 30
        num_tokens = min(limit, self._switches.num_tokens)
        weights, source = (lora.name, lora.path) if lora else (self._model, None)
        logprobs = body.get("logprobs")
        return Generation(
            response_id=rid,
            weights=weights,
            tokens=say(weights, source, prompt, num_tokens),
            finish_reason="length" if limit <= self._switches.num_tokens else "stop",
            num_prompt_tokens=num_prompt_tokens,
            is_streaming=bool(body.get("stream")),
            num_choices=body.get("n") or 1,
            priority=body.get("priority") or 0,
            contents=lora.contents if lora else self._model,
            prompts=prompts_of(body),
            num_logprobs=logprobs if isinstance(logprobs, int) else 0,
        )

    def _checked_length(self, prompt: str) -> int:
        num_tokens, limit = count_tokens(prompt), self._options.context_length
        if num_tokens < limit:
            return num_tokens
        if self._options.allow_auto_truncate:
            return limit - 1
        message = (
            f"The input ({num_tokens} tokens) is longer than the model's context length "
            f"({limit} tokens)."
        )
        raise Refused(400, "BadRequestError", message)

    def order(self, generation: Generation) -> float:
        """Habit: the higher priority is served first, unless told otherwise; off by default."""
        if not self._options.enable_priority_scheduling:
            return 0
        sign = 1 if self._options.schedule_low_priority_values_first else -1
        return sign * generation.priority

    def make_room(self, generation: Generation) -> None:
        """Refuses the newcomer, or evicts a less important one (managers/scheduler.py)."""
        options, waiting = self._options, self._batch.waiting
        is_ignored = generation.priority and not options.enable_priority_scheduling
        if is_ignored and options.abort_on_priority_when_disabled:
            raise Refused(503, "503", "Using priority is disabled for this server.")
        limit = options.max_queued_requests
        if limit is None or not self._batch.is_full or len(waiting) < limit:
            return
        if options.enable_priority_scheduling and waiting:
            last = max(waiting, key=self.order)
            if self.order(generation) < self.order(last):
                self._batch.evict(last, EVICTED)
                return
        raise Refused(503, "503", QUEUE_FULL)
