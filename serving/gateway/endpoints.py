"""The routes that the gateway relays, and nothing else: what is not listed here cannot be reached.

Engines expose routes that change or stop them (`/sleep`, `/load_lora_adapter`, `/pause`); the
table is an allow-list, so a new one of theirs is never reachable through us by accident.
Called by `client.py` for each request head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ErrorShape = Literal["openai", "anthropic"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One relayed route.

    Attributes:
        path: Path here and on the engine.
        error_shape: Whose error body the clients of this route expect.
        model_optional: Whether a request without `model` goes to the only base model there is.
        injects_usage: Whether a stream can be asked for its usage by `stream_options`, so that
            tokens are always known; the extra chunk is withheld from a client that did not ask.
    """

    path: str
    error_shape: ErrorShape = "openai"
    model_optional: bool = False
    injects_usage: bool = False


RELAYED: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("/v1/chat/completions", injects_usage=True),
        Endpoint("/v1/completions", injects_usage=True),
        Endpoint("/v1/embeddings"),
        Endpoint("/v1/responses"),
        Endpoint("/v1/messages", error_shape="anthropic"),
        Endpoint("/v1/messages/count_tokens", error_shape="anthropic"),
        Endpoint("/tokenize", model_optional=True),
        Endpoint("/detokenize", model_optional=True),
        Endpoint("/v1/score"),
        Endpoint("/v1/rerank"),
    )
}
"""Every one takes POST with a JSON object."""

STORED_RESPONSE = Endpoint("/v1/responses/{id}")
"""A response that its replica keeps: GET, DELETE, and POST to its `/cancel`."""

STORED_PREFIX = "/v1/responses/"
MODELS = "/v1/models"
HEALTHZ = "/healthz"
READYZ = "/readyz"
METRICS = "/metrics"
LOCAL = frozenset({MODELS, HEALTHZ, READYZ, METRICS})
"""Answered by the gateway itself, on GET and HEAD; `/v1/models/{id}` too."""

OPEN = frozenset({HEALTHZ, READYZ, METRICS})
"""Answered without an API key: probes and scrapers have none. They name models, never prompts."""
