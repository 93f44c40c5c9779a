"""What the gateway has to know of an engine: one `Dialect` an engine, beside this file.

A dialect turns our request into the engine's and the engine's errors into ours. It does no I/O.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serving.config import EngineKind
    from serving.errors import ServingError


class Dialect(ABC):
    """The habits of one engine."""

    kind: EngineKind
    health_path: str
    """GET; 200 when the engine can serve."""
    models_path: str
    """GET; OpenAI's list of models."""
    routes_path: str
    """GET; OpenAPI document that names the offered routes."""
    default_paths: frozenset[str]
    """Endpoints to assume where that document is switched off."""

    @abstractmethod
    def offered_paths(self, openapi_paths: Iterable[str]) -> frozenset[str]:
        """Which of the relayed endpoints the engine offers, by its own OpenAPI paths."""

    @abstractmethod
    def request_id_header(self) -> bytes:
        """Header by which the engine takes our inference id as its request id."""

    @abstractmethod
    def engine_body(
        self,
        body: bytes,
        path: str,
        inference_id: bytes,
        engine_name: str | None,
        *,
        add_usage: bool,
    ) -> bytes:
        """The body as this engine wants it; the same object where nothing has to change.

        Args:
            body: A JSON object, already found valid.
            path: The endpoint's.
            inference_id: Shall be, or be in, the response's `id`.
            engine_name: What to put as `model`, or None to leave it.
            add_usage: Whether to ask for the usage of a stream.

        Raises:
            BadRequest: If the body is not what it was taken for.
        """

    @abstractmethod
    def to_error(self, status: int, body: bytes, model: str) -> ServingError:
        """Our error for an engine's error response.

        Args:
            status: The engine's HTTP status, 400 or more.
            body: The engine's body, perhaps cut.
            model: Public name of the requested model.
        """
