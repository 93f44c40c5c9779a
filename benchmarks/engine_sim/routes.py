"""The simulated engine's routes: vLLM's paths, texts and errors.

Called by `connection.py` with whole requests; generating routes answer through the engine, all others
at once.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Protocol

from benchmarks.engine_sim import request as requests
from benchmarks.engine_sim.answer import Answer, Client
from benchmarks.engine_sim.errors import SimError
from benchmarks.engine_sim.kv_events import BUFFER_STEPS, HIGH_WATER_MARK
from benchmarks.engine_sim.metrics import CONTENT_TYPE
from benchmarks.engine_sim.speech import text_of
from benchmarks.engine_sim.tokens import decode, encode
from benchmarks.engine_sim.wire import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.engine_sim.engine import Engine
    from benchmarks.engine_sim.request import Endpoint

VERSION = "0.32.0"
_ID_PREFIX: dict[Endpoint, str] = {"chat": "chatcmpl-", "completion": "cmpl-"}


class GeneratingClient(Client, Protocol):
    """Whose answer may take a while."""

    def wait_for(self, answer: Answer) -> None:
        """The answer is on its way."""


class Routes:
    """All routes of one engine."""

    def __init__(self, engine: Engine) -> None:
        """Mounts them.

        Args:
            engine: Answers what they ask.
        """
        self._engine = engine
        self._clock = Clock()
        self._gets: dict[bytes, Callable[[], bytes]] = {
            b"/health": self._empty,
            b"/ping": self._empty,
            b"/load": lambda: self._clock.json(200, {"server_load": self._num_unfinished()}),
            b"/version": lambda: self._clock.json(200, {"version": VERSION}),
            b"/v1/models": self._models,
            b"/openapi.json": self._openapi,
            b"/metrics": self._metrics,
            b"/kv_event_sources": self._kv_event_sources,
        }
        self._posts: dict[bytes, Callable[[bytes], bytes]] = {
            b"/ping": lambda body: self._empty(),
            b"/tokenize": self._tokenize,
            b"/detokenize": self._detokenize,
            b"/v1/load_lora_adapter": self._load_lora,
            b"/v1/unload_lora_adapter": self._unload_lora,
        }

    def handle(
        self,
        client: GeneratingClient,
        method: bytes,
        path: bytes,
        body: bytes,
        request_id: str | None,
    ) -> None:
        """Answers one request, or lets the engine do it.

        Args:
            client: Who asked.
            method: HTTP method.
            path: Without its query.
            body: Whole body.
            request_id: Its `x-request-id`.
        """
        try:
            if method == b"POST" and path == b"/v1/chat/completions":
                chat = requests.decode_body(body, requests.ChatRequest)
                self._generate(client, "chat", chat, request_id)
            elif method == b"POST" and path == b"/v1/completions":
                completion = requests.decode_body(body, requests.CompletionRequest)
                self._generate(client, "completion", completion, request_id)
            else:
                client.write(self._page(method, path, body))
                client.finish()
        except SimError as error:
            client.write(self._clock.error(error))
            client.finish()

    def _generate(
        self,
        client: GeneratingClient,
        endpoint: Endpoint,
        request: requests.GenerateRequest,
        request_id: str | None,
    ) -> None:
        requests.check(request)
        named = request_id or request.request_id or uuid.uuid4().hex[:16]
        base: dict[str, object] = {
            "id": _ID_PREFIX[endpoint] + named,
            "object": _object(endpoint, is_streaming=bool(request.stream)),
            "created": int(time.time()),
            "model": request.model or self._engine.options.model,
        }
        answer = Answer(client, self._clock, endpoint, request, base)
        self._engine.submit(answer, request)
        client.wait_for(answer)

    def _page(self, method: bytes, path: bytes, body: bytes) -> bytes:
        if method == b"GET" and path in self._gets:
            return self._gets[path]()
        if method == b"POST" and path in self._posts:
            return self._posts[path](body)
        if path in self._gets or path in self._posts or path in _GENERATE_PATHS:
            return self._clock.json(405, {"detail": "Method Not Allowed"})
        return self._clock.json(404, {"detail": "Not Found"})

    # Pages.

    def _empty(self) -> bytes:
        return self._clock.sized(200, b"", None)

    def _num_unfinished(self) -> int:
        scheduler = self._engine.scheduler
        return len(scheduler.running) + len(scheduler.waiting)

    def _models(self) -> bytes:
        engine = self._engine
        options = engine.options
        cards = [_card(options.model, options.model, None, options.max_model_len)]
        paths = engine.adapters.paths.items()
        cards += [_card(name, path, options.model, None) for name, path in paths]
        return self._clock.json(200, {"object": "list", "data": cards})

    def _openapi(self) -> bytes:
        paths: dict[str, dict[str, object]] = {}
        for method, served in (("get", self._gets), ("post", self._posts)):
            for path in served:
                paths.setdefault(path.decode(), {})[method] = {}
        paths |= {path.decode(): {"post": {}} for path in _GENERATE_PATHS}
        info = {"title": "FastAPI", "version": "0.1.0"}
        return self._clock.json(200, {"openapi": "3.1.0", "info": info, "paths": paths})

    def _metrics(self) -> bytes:
        return self._clock.sized(200, self._engine.exposition(), CONTENT_TYPE)

    def _kv_event_sources(self) -> bytes:
        publisher = self._engine.publisher
        if publisher is None:
            return self._clock.json(200, {})
        source = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": publisher.endpoint,
            "replay_endpoint": publisher.replay_endpoint,
            "buffer_steps": BUFFER_STEPS,
            "hwm": HIGH_WATER_MARK,
            "max_queue_size": HIGH_WATER_MARK,
            "topic": "",
        }
        return self._clock.json(200, {"0": source})

    def _tokenize(self, body: bytes) -> bytes:
        asked = requests.decode_body(body, requests.TokenizeRequest)
        if asked.messages is not None:
            tokens = requests.conversation_tokens(asked.messages)
        else:
            tokens = encode(asked.prompt or "")
        told = {
            "count": len(tokens),
            "max_model_len": self._engine.options.max_model_len,
            "tokens": tokens,
            "token_strs": [text_of(one) for one in tokens] if asked.return_token_strs else None,
        }
        return self._clock.json(200, told)

    def _detokenize(self, body: bytes) -> bytes:
        asked = requests.decode_body(body, requests.DetokenizeRequest)
        try:
            return self._clock.json(200, {"prompt": decode(asked.tokens)})
        except ValueError as error:
            raise SimError(400, "BadRequestError", str(error), "tokens") from None

    def _load_lora(self, body: bytes) -> bytes:
        asked = requests.decode_body(body, requests.LoadLoraRequest)
        told = self._engine.adapters.load(
            asked.lora_name, asked.lora_path, in_place=asked.load_inplace
        )
        return self._clock.sized(200, told.encode(), None)

    def _unload_lora(self, body: bytes) -> bytes:
        asked = requests.decode_body(body, requests.UnloadLoraRequest)
        told = self._engine.adapters.unload(asked.lora_name)
        return self._clock.sized(200, told.encode(), None)


_GENERATE_PATHS = (b"/v1/chat/completions", b"/v1/completions")


def _object(endpoint: Endpoint, *, is_streaming: bool) -> str:
    if endpoint == "completion":
        return "text_completion"
    return "chat.completion.chunk" if is_streaming else "chat.completion"


def _card(name: str, root: str, parent: str | None, max_model_len: int | None) -> dict[str, object]:
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": int(time.time()),
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
