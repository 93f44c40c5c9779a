"""Asks one process over HTTP whether it is ready, for whoever has just started it.

Owns: the two questions of a start (an engine: healthy and listing its model; any other process: a
path answers 200). Never: follows the health of a replica that serves, which is the gateway's own
task. Called by: `serving/fleet/process.py` while a process starts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from serving.fleet.http_client import Got, get
from serving.gateway.tls import unverified_context

if TYPE_CHECKING:
    import ssl

ASK_DEADLINE_S = 5.0
NO_ANSWER = Got(0, b"")


class Readiness(Protocol):
    """A question to a starting process."""

    async def is_ready(self) -> bool:
        """Say whether the process can take requests; no answer within a deadline is a no."""


@dataclass(frozen=True)
class PathReady:
    """Ready when one path answers 200."""

    host: str
    port: int
    path: str
    is_tls: bool = False
    """Whether to ask over TLS; a process of our own need not prove its name."""

    async def is_ready(self) -> bool:
        """Ask once."""
        tls = unverified_context() if self.is_tls else None
        return (await _ask(self.host, self.port, self.path, tls)).status == 200


@dataclass(frozen=True)
class EngineReady:
    """Ready when the engine is healthy and lists its model."""

    host: str
    port: int
    served_name: str
    health_path: str = "/health"

    async def is_ready(self) -> bool:
        """Ask for its health, then for its models."""
        if (await _ask(self.host, self.port, self.health_path)).status != 200:
            return False
        models = await _ask(self.host, self.port, "/v1/models")
        return models.status == 200 and self.served_name in _model_names(models.body)


async def _ask(host: str, port: int, path: str, tls: ssl.SSLContext | None = None) -> Got:
    try:
        return await get(host, port, path, timeout_s=ASK_DEADLINE_S, api_key=None, tls=tls)
    except OSError:
        return NO_ANSWER


def _model_names(body: bytes) -> set[str]:
    try:
        cards: Any = json.loads(body)["data"]
        return {str(card["id"]) for card in cards}
    except (ValueError, KeyError, TypeError):
        return set()
