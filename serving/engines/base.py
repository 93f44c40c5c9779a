"""What the gateway has to know of an engine: one `Dialect` an engine, beside this file.

A dialect turns our request into the engine's, and the engine's answers and errors into OpenAI's. It
does no I/O and keeps no state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from serving.engines.error_text import read_error
from serving.errors import (
    ContextTooLong,
    EngineRefused,
    NotOffered,
    Overloaded,
    UnknownModel,
    UnknownResponse,
    UpstreamBroken,
)

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable

    from serving.config import EngineKind
    from serving.errors import ServingError


GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
_NO_RESPONSE = "Response with id"
"""How all three begin to say that they do not keep a response."""


class EngineAdapter(NamedTuple):
    """The adapter version that a request is for, on the replica that it goes to.

    Attributes:
        version: `name@digest12`.
        lora_id: Unique number of the version.
        path: Its folder as the engine sees it.
    """

    version: str
    lora_id: int
    path: str


class EngineCall(NamedTuple):
    """One request, as a dialect needs to know it; a tuple, since each attempt makes one.

    Attributes:
        path: The endpoint's.
        response_id: What the response's `id` shall be; has our inference id in it.
        public_name: What the client shall read as `model`.
        engine_name: What the engine calls the model.
        sent_name: What the body says now, or None.
        add_usage: Whether to ask for the usage of a stream because the client did not.
        adapter: The published version that shall answer; None for the engine's own models.
    """

    path: str
    response_id: str
    public_name: str
    engine_name: str
    sent_name: str | None
    add_usage: bool
    adapter: EngineAdapter | None = None


class Canary(NamedTuple):
    """A request that proves that an engine generates, not only that its server answers."""

    path: str
    body: bytes


class Dialect(ABC):
    """The habits of one engine."""

    kind: EngineKind
    health_path: str
    """GET; 200 when the engine says that it can serve."""
    models_path = "/v1/models"
    """GET; OpenAI's list of models."""
    routes_path = "/openapi.json"
    """GET; OpenAPI document that names the offered routes."""
    default_paths: frozenset[str]
    """Endpoints to assume where that document is switched off."""
    context_text: re.Pattern[str]
    """Finds the sentence, or the `param`, in which the engine says that a prompt is too long."""
    own_event_mark: bytes | None = None
    """How an event begins that is the engine's own business and is withheld from clients."""
    ends_with_done = True
    """Whether a chat or completion stream without `data: [DONE]` is a broken one."""
    lists_adapters = True
    """Whether its list of models has the adapters that it has loaded; else it loads them at use."""
    adapter_slots = 2
    """Adapters that one batch can have, to assume: engines do not tell it in their list of models."""

    def offered_paths(self, openapi_paths: Iterable[str]) -> frozenset[str]:
        """Which endpoints the engine offers, by its own OpenAPI paths."""
        return frozenset(openapi_paths)

    def engine_name(self, name: str, parent: str | None) -> str:
        """How requests select a model of the engine's list.

        Args:
            name: As listed.
            parent: Its base model, for an adapter.
        """
        return name

    def request_id_header(self) -> bytes:
        """Header by which our inference id goes to the engine; logged by those that do not use it."""
        return b"x-request-id"

    @abstractmethod
    def engine_body(self, body: bytes, call: EngineCall) -> bytes:
        """The body as this engine wants it; the same object where nothing has to change.

        Args:
            body: A JSON object, already found valid.
            call: What it belongs to.

        Raises:
            BadRequest: If it asks for what this engine cannot do.
        """

    def rewriter(self, call: EngineCall) -> Callable[[bytes], bytes] | None:
        """What has to be done to each JSON document of the answer; None lets bytes pass untouched."""
        return None

    def hides_event(self, event: bytes) -> bool:
        """Whether an event of a stream is the engine's own business."""
        return self.own_event_mark is not None and event.startswith(self.own_event_mark)

    def canary(self, engine_name: str, offered: frozenset[str]) -> Canary | None:
        """The cheapest request that makes the engine generate, or None where it offers none."""
        if COMPLETIONS in offered:
            fields = {"model": engine_name, "prompt": "1", "max_tokens": 1}
            return Canary(COMPLETIONS, msgspec.json.encode(fields))
        if "/v1/embeddings" in offered:
            return Canary(
                "/v1/embeddings", msgspec.json.encode({"model": engine_name, "input": "1"})
            )
        return None

    def to_error(self, status: int, body: bytes, model: str) -> ServingError:
        """Our error for an engine's error response.

        Args:
            status: The engine's HTTP status, 300 or more.
            body: The engine's body, perhaps cut.
            model: Public name of the requested model.
        """
        message, param = read_error(body)
        if status == 404:
            if message in ("Not Found", ""):
                return NotOffered(f"The engine that serves '{model}' does not offer this endpoint.")
            if message.startswith(_NO_RESPONSE):
                return UnknownResponse("No replica keeps the response that is asked for.")
            return UnknownModel(f"The model '{model}' does not exist.", param="model")
        if status in (429, 503):
            return Overloaded("The engine's queue is full. Try again shortly.")
        if status >= 500 or status < 400:
            return UpstreamBroken("The engine failed while it worked on this request.")
        if status in (401, 403):
            return UpstreamBroken("The engine refused the gateway's own API key.")
        if self.context_text.search(message) or (param and self.context_text.search(param)):
            return ContextTooLong(message, param=param)
        return EngineRefused(
            message or "The engine refused this request.", status=status, param=param
        )

    def lacks_adapter(self, status: int, body: bytes) -> bool:
        """Whether an error response means that the engine does not have the requested adapter.

        Args:
            status: The engine's HTTP status, 300 or more.
            body: The engine's body, perhaps cut.
        """
        return False

    def event_error(self, event: bytes, model: str) -> ServingError:
        """Our error for an event that carries an engine's."""
        _, _, data = event.partition(b"data:")
        return self.to_error(_code_of(data), data.strip(), model)


def _code_of(data: bytes) -> int:
    """The HTTP status that an error event names, else 500."""
    try:
        decoded: Any = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return 500
    error = decoded.get("error") if isinstance(decoded, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    try:
        return int(code) if code is not None and 400 <= int(code) < 600 else 500
    except (TypeError, ValueError):
        return 500
