"""SGLang's routes beside generation: models, health, loads, adapters, abort and pause (0.5.23).

Used by `sglang_server.py`, whose state it reads and changes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from base_server import page
from responses_wire import CREATED
from scripted_engine import Act
from sglang_loads import exposition, loads, used_tokens
from sglang_loras import LoraRefused
from speech import count_tokens, prompt_of

if TYPE_CHECKING:
    from base_server import Handler, Reply
    from scripted_engine import Seen
    from sglang_server import SglangServer

_HEALTH_TIMEOUT_S = 20.0
"""SGLANG_HEALTH_CHECK_TIMEOUT."""
_KV_BLOCK_SIZE_TOKENS = 1
_OPENAPI_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/audio/transcriptions",
    "/v1/tokenize",
    "/v1/detokenize",
    "/tokenize",
    "/detokenize",
    "/generate",
    "/health",
    "/v1/models",
)


class SglangControl:
    """Handlers of one server."""

    def __init__(self, server: SglangServer) -> None:
        self._server = server
        self._admin: dict[tuple[str, str], Handler] = {
            ("POST", "/load_lora_adapter"): self._load_lora,
            ("POST", "/unload_lora_adapter"): self._unload_lora,
            ("POST", "/abort_request"): self._abort_request,
            ("POST", "/pause_generation"): self._pause,
            ("POST", "/continue_generation"): self._continue,
            ("POST", "/flush_cache"): lambda seen: page(200, "Cache flushed.\n", "text/plain"),
        }

    @property
    def admin_paths(self) -> tuple[str, ...]:
        """Paths that take only the admin key, where there is one."""
        return tuple(path for _, path in self._admin)

    def routes(self) -> dict[tuple[str, str], Handler]:
        """(method, path) → handler."""
        server = self._server
        routes: dict[tuple[str, str], Handler] = {
            **self._admin,
            ("GET", "/v1/models"): self._models,
            ("GET", "/v1/models/{id}"): self._one_model,
            ("GET", "/openapi.json"): self._openapi,
            ("GET", "/health"): self._health,
            ("GET", "/health_generate"): self._health,
            # `/ready` looks at flags only; `/ping` looks at the same ones but for the pause.
            ("GET", "/ready"): lambda seen: page(200 if self._is_ready() else 503, b""),
            ("GET", "/ping"): lambda seen: page(200 if self._is_well() else 503, b""),
            ("GET", "/model_info"): lambda seen: page(200, {"model_path": server.model}),
            ("GET", "/server_info"): self._server_info,
            ("GET", "/v1/loads"): self._loads,
        }
        for prefix in ("", "/v1"):
            routes["POST", f"{prefix}/tokenize"] = self._tokenize
            routes["POST", f"{prefix}/detokenize"] = self._detokenize
        if server.options.enable_metrics:
            # Habit: without the flag there is no such route.
            routes["GET", "/metrics"] = lambda seen: page(
                200,
                exposition(server.model, server.batch, server.loras, server.totals),
                "text/plain; version=0.0.4; charset=utf-8",
            )
        return routes

    # Models.

    def _card(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        limit = self._server.options.context_length if parent is None else None
        card = {"id": name, "object": "model", "created": CREATED, "owned_by": "sglang"}
        return {**card, "root": root, "parent": parent, "max_model_len": limit}

    def _models(self, seen: Seen) -> Reply:
        server = self._server
        cards = [self._card(server.model, server.model, None)]
        loaded = server.loras.paths().items()
        cards += [self._card(name, path, server.model) for name, path in loaded]
        return page(200, {"object": "list", "data": cards})

    def _one_model(self, seen: Seen) -> Reply:
        """Habit: only the served base model is found, and this 404 is nested."""
        name = seen.target.rpartition("/")[2]
        if name == self._server.model:
            return page(200, self._card(name, name, None))
        message = f"The model '{name}' does not exist"
        error = {"message": message, "type": "invalid_request_error", "param": "model"}
        return page(404, {"error": {**error, "code": "model_not_found"}})

    def _openapi(self, seen: Seen) -> Reply:
        return page(200, {"openapi": "3.1.0", "paths": {path: {} for path in _OPENAPI_PATHS}})

    # Health and load.

    def _is_well(self) -> bool:
        state = self._server.state
        return state.is_healthy and not state.is_draining

    def _is_ready(self) -> bool:
        return self._is_well() and not self._server.batch.is_paused

    def _health(self, seen: Seen) -> Reply:
        """Habit: generates one token, and takes its time for it."""
        if not self._is_well():
            yield from page(503, b"")
            return
        if self._server.batch.is_paused:
            yield _HEALTH_TIMEOUT_S
            yield from page(503, b"")
            return
        yield self._server.state.health_s
        yield from page(200, b"")

    def _server_info(self, seen: Seen) -> Reply:
        server = self._server
        told: dict[str, Any] = {
            "model_path": server.model,
            "served_model_name": server.model,
            "version": "0.5.23",
            "dp_size": server.options.dp_size,
            "enable_lora": server.options.enable_lora,
            "max_loras_per_batch": server.options.max_loras_per_batch,
            "max_loaded_loras": server.options.max_loaded_loras,
            "internal_states": [{"num_used_tokens": used_tokens(server.batch)}],
        }
        if server.options.kv_events_port is not None:
            told["kv_events"] = {
                "endpoint_host": "*",
                "endpoint_port_base": server.options.kv_events_port,
                "topic": "",
                "block_size": _KV_BLOCK_SIZE_TOKENS,
                "dp_size": server.options.dp_size,
            }
        return page(200, told)

    def _loads(self, seen: Seen) -> Reply:
        server = self._server
        query = parse_qs(seen.target.partition("?")[2])
        include = ",".join(query.get("include", []))
        if query.get("format") == ["prometheus"]:
            text = exposition(server.model, server.batch, server.loras, server.totals)
            return page(200, text, "text/plain; version=0.0.4; charset=utf-8")
        try:
            told = loads(server.batch, server.loras, server.totals, include)
        except ValueError as error:
            return page(400, {"error": {"message": str(error)}})
        return page(200, told)

    # Adapters.

    def _load_lora(self, seen: Seen) -> Reply:
        if self._server.options.dp_size > 1:
            # Habit: an assertion that nobody catches.
            yield from page(500, "Internal Server Error", "text/plain; charset=utf-8")
            return
        if self._server.state.lora_load_hangs:
            yield Act.HANG
        body = seen.json
        try:
            if self._server.state.lora_load_error is not None:
                raise LoraRefused(self._server.state.lora_load_error)
            self._server.loras.load(
                body["lora_name"], body["lora_path"], is_pinned=bool(body.get("pinned"))
            )
        except LoraRefused as error:
            yield from self._lora_answer(str(error))
            return
        yield from self._lora_answer(None)

    def _unload_lora(self, seen: Seen) -> Reply:
        """Habits: waits for the requests that use it, and does not revoke (`SglangLoras.find`)."""
        try:
            lora = self._server.loras.begin_unload(seen.json["lora_name"])
        except LoraRefused as error:
            yield from self._lora_answer(str(error))
            return
        yield lora.unused
        yield from self._lora_answer(None)

    def _lora_answer(self, error: str | None) -> Reply:
        told = {
            "rid": None,
            "http_worker_ipc": None,
            "success": error is None,
            "error_message": error or "",
            "loaded_adapters": self._server.loras.paths(),
        }
        return page(200 if error is None else 400, told)

    # Abort and pause.

    def _abort_request(self, seen: Seen) -> Reply:
        body = json.loads(seen.body or b"{}")
        rid = body.get("rid") or ""
        batch = self._server.batch
        for generation in batch.everybody:
            # Habit: all whose id *begins* with it (managers/scheduler.py, `abort_request`).
            if body.get("abort_all") or (rid and generation.response_id.startswith(rid)):
                batch.abort(generation)
        return page(200, b"")

    def _pause(self, seen: Seen) -> Reply:
        """New requests wait while it lasts."""
        mode = json.loads(seen.body or b"{}").get("mode", "abort")
        batch = self._server.batch
        batch.is_paused = True
        if mode == "abort":
            for generation in batch.everybody:
                batch.abort(generation)
        message = "Generation paused successfully."
        return page(200, {"status": "ok", "message": message})

    def _continue(self, seen: Seen) -> Reply:
        self._server.batch.is_paused = False
        self._server.batch.fill()
        message = "Generation continued successfully."
        return page(200, {"status": "ok", "message": message})

    # Tokens.

    def _tokenize(self, seen: Seen) -> Reply:
        count = count_tokens(prompt_of(seen.json))
        limit = self._server.options.context_length
        return page(200, {"tokens": list(range(count)), "count": count, "max_model_len": limit})

    def _detokenize(self, seen: Seen) -> Reply:
        return page(200, {"text": " ".join(f"t{one}" for one in seen.json["tokens"])})
