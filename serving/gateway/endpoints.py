"""The routes that the gateway relays, and nothing else: what is not listed here cannot be reached.

Engines expose routes that change or stop them (`/sleep`, `/load_lora_adapter`, `/pause`); the
table is an allow-list, so a new one of theirs is never reachable through us by accident.
Called by `client.py` for each request head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ErrorShape = Literal["openai", "anthropic"]
Kind = Literal["json", "form", "control"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One relayed route.

    Attributes:
        path: Path here and on the engine.
        error_shape: Whose error body the clients of this route expect.
        model_optional: Whether a request without `model` goes to the only base model there is.
        injects_usage: Whether a stream can be asked for its usage by `stream_options`, so that
            tokens are always known; the extra chunk is withheld from a client that did not ask.
        kind: What its body is: JSON, held whole; a multipart form, relayed while it comes; or the
            control plane's business, relayed unread.
        needs_admin: Whether it takes an admin key.
    """

    path: str
    error_shape: ErrorShape = "openai"
    model_optional: bool = False
    injects_usage: bool = False
    kind: Kind = "json"
    needs_admin: bool = False


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
        Endpoint("/v1/audio/transcriptions", kind="form"),
        Endpoint("/v1/audio/translations", kind="form"),
    )
}
"""To an engine, by POST."""

CONTROL = (Endpoint("/admin/v1", kind="control", needs_admin=True),)
"""Whatever is below these paths goes to the control plane. Nothing else of its own is reachable."""
CONTROL_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"

STORED_RESPONSE = Endpoint("/v1/responses/{id}")
"""A response that its replica keeps: GET, DELETE, and POST to its `/cancel`."""

STORED_PREFIX = "/v1/responses/"
MODELS = "/v1/models"
HEALTHZ = "/healthz"
READYZ = "/readyz"
METRICS = "/metrics"
LOCAL = frozenset({MODELS, HEALTHZ, READYZ, METRICS})
"""Answered by the gateway itself, on GET and HEAD; `/v1/models/{id}` too."""


def endpoint_of(path: str) -> Endpoint | None:
    """The relayed route of a path, or None."""
    endpoint = RELAYED.get(path)
    if endpoint is not None:
        return endpoint
    if path.startswith(STORED_PREFIX):
        return STORED_RESPONSE
    return next((one for one in CONTROL if path.startswith(f"{one.path}/")), None)


OPEN = frozenset({HEALTHZ, READYZ, METRICS})
"""Answered without an API key: probes and scrapers have none. They name models, never prompts."""
