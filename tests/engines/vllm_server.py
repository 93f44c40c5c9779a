"""A server with the adapter routes of vLLM 0.32 and its bad habits; it generates no real text.

For what a real vLLM cannot be told to do: refuse, hang, lose its adapters, have the wrong weights. Its
habits are marked `Habit:`. Used by the tests of the control plane.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_weights import choices_of, contents_of, prompts_of
from base_server import EngineServer, Failure, page
from batch import Generation
from responses_wire import CREATED
from scripted_engine import Act, error_body
from speech import count_tokens, prompt_of, say
from switches import Switches

if TYPE_CHECKING:
    from base_server import Reply
    from scripted_engine import Seen


@dataclass
class VllmSwitches(Switches):
    """Its own faults.

    Attributes:
        lora_load_error: Message of the 500 that it answers loads with.
        lora_load_hangs: Loads are not answered.
        wrong_contents: What adapters that are loaded from now on say instead of their own.
        num_loads_lost: Loads that are done and then answered with 500.
    """

    lora_load_error: str | None = None
    lora_load_hangs: bool = False
    wrong_contents: str | None = None
    num_loads_lost: int = 0


class VllmServer(EngineServer):
    """vLLM.

    Attributes:
        adapters: Name → path: what `/v1/models` lists.
        cached: Name → contents, of those in memory; the least recently used goes first.
        max_cpu_loras: How many those are.
        is_dead: Whether its engine has died.
    """

    def __init__(
        self, model: str = "m", port: int = 0, *, max_cpu_loras: int = 16, **switches: Any
    ) -> None:
        self.state = VllmSwitches(**switches)
        super().__init__(model, port, self.state)
        self.adapters: dict[str, str] = {}
        self.cached: OrderedDict[str, str] = OrderedDict()
        self.max_cpu_loras = max_cpu_loras
        self.is_dead = False
        self.routes = {
            ("GET", "/health"): lambda seen: page(503 if self.is_dead else 200, b""),
            ("GET", "/v1/models"): self._models,
            ("GET", "/openapi.json"): lambda seen: page(200, {"paths": {"/v1/completions": {}}}),
            ("POST", "/v1/load_lora_adapter"): self._load,
            ("POST", "/v1/unload_lora_adapter"): self._unload,
            ("POST", "/v1/completions"): self.disturbed(self._complete),
        }

    def restart(self) -> None:
        """Forgets its adapters, as a new process does."""
        self.adapters.clear()
        self.cached.clear()
        self.is_dead = False

    def refusal(self, seen: Seen) -> Reply | None:
        """It has no API key."""
        return None

    def error_reply(self, status: int, message: str) -> Reply:
        """Errors are nested."""
        kind = {404: "NotFoundError", 400: "InvalidUserInput"}.get(status, "InternalServerError")
        return page(status, error_body(message, kind, status))

    def _models(self, seen: Seen) -> Reply:
        base = {"id": self.model, "object": "model", "parent": None, "max_model_len": 2048}
        cards: list[dict[str, Any]] = [base]
        for name, path in self.adapters.items():
            cards.append({"id": name, "object": "model", "parent": self.model, "root": path})
        return page(200, {"object": "list", "data": cards})

    def _load(self, seen: Seen) -> Reply:
        name, path = seen.json["lora_name"], seen.json["lora_path"]
        if self.state.lora_load_hangs:
            yield Act.HANG
        if self.state.lora_load_error is not None:
            yield from self.error_reply(500, self.state.lora_load_error)
            return
        if name in self.adapters:
            told = f"The lora adapter '{name}' has already been loaded. If you want to load the "
            yield from self.error_reply(400, f"{told}adapter in place, set 'load_inplace' to True.")
            return
        if not Path(path).is_dir():
            told = f"Loading lora {name} failed: No adapter found for <path>"
            yield from self.error_reply(404, told)
            return
        self.adapters[name] = path
        self._read(name, self.state.wrong_contents or contents_of(path))
        if self.state.num_loads_lost:
            self.state.num_loads_lost -= 1
            yield from self.error_reply(500, "the answer was lost")
            return
        told = f"Success: LoRA adapter '{name}' added successfully."
        yield from page(200, told, "text/plain; charset=utf-8")

    def _unload(self, seen: Seen) -> Reply:
        """Habit: only the name goes; the weights stay until others push them out."""
        name = seen.json["lora_name"]
        if self.adapters.pop(name, None) is None:
            return self.error_reply(404, f"The lora adapter '{name}' cannot be found.")
        told = f"Success: LoRA adapter '{name}' removed successfully."
        return page(200, told, "text/plain; charset=utf-8")

    def _read(self, name: str, contents: str) -> None:
        self.cached[name] = contents
        self.cached.move_to_end(name)
        while len(self.cached) > self.max_cpu_loras:
            self.cached.popitem(last=False)

    def _contents(self, name: str) -> str:
        """Habit: what was pushed out is read again, and a folder that is gone ends the engine."""
        if name not in self.cached:
            if not Path(self.adapters[name]).is_dir():
                self.is_dead = True
                raise Failure("EngineDead")
            self._read(name, contents_of(self.adapters[name]))
        self.cached.move_to_end(name)
        return self.cached[name]

    def _complete(self, seen: Seen) -> Reply:
        body = seen.json
        name = body["model"]
        if name != self.model and name not in self.adapters:
            yield from self.error_reply(404, f"The model `{name}` does not exist.")
            return
        try:
            if self.is_dead:
                raise Failure("EngineDead")
            contents = self.model if name == self.model else self._contents(name)
        except Failure as error:
            yield from self.error_reply(500, str(error))
            return
        prompt = prompt_of(body)
        generation = Generation(
            response_id=f"cmpl-{uuid.uuid4().hex}",
            weights=name,
            tokens=say(name, contents, prompt, min(body.get("max_tokens") or 16, 16)),
            finish_reason="length",
            num_prompt_tokens=count_tokens(prompt),
            is_streaming=False,
            contents=contents,
            prompts=prompts_of(body) or (prompt,),
            num_logprobs=body.get("logprobs") or 0,
        )
        with self.holding(generation):
            yield generation.may_run
            for step in self.tokens(generation):
                if not isinstance(step, str):
                    yield step
        answer = {"id": generation.response_id, "object": "text_completion", "created": CREATED}
        answer |= {"model": name, "usage": generation.usage}
        yield from self.whole(
            200, {**answer, "choices": choices_of(generation, {"finish_reason": "length"})}
        )
