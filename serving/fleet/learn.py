"""What a replica serves, asked of the replica itself: its models and its routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from serving.fleet.http_get import get

if TYPE_CHECKING:
    from serving.routing.snapshot import Replica


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of an engine's model list.

    Attributes:
        name: As the engine calls it.
        parent: Base model, for an adapter.
        max_model_len: Context length in tokens, where the engine tells.
    """

    name: str
    parent: str | None
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class Served:
    """What one replica serves.

    Attributes:
        models: In the engine's order.
        offered: Paths of the relayed endpoints that the engine offers.
    """

    models: tuple[ServedModel, ...]
    offered: frozenset[str]


async def is_healthy(replica: Replica, *, timeout_s: float, api_key: str | None) -> bool:
    """Whether the replica's health route answers 200 in time."""
    path = replica.dialect.health_path
    try:
        got = await get(replica.host, replica.port, path, timeout_s=timeout_s, api_key=api_key)
    except (OSError, UnicodeError):  # a host that cannot be a name is a UnicodeError
        return False
    return got.status == 200


async def learn(replica: Replica, *, timeout_s: float, api_key: str | None) -> Served | None:
    """Asks a replica for its models and routes; None if it does not answer as it should."""
    dialect = replica.dialect
    try:
        models = await get(
            replica.host, replica.port, dialect.models_path, timeout_s=timeout_s, api_key=api_key
        )
        routes = await get(
            replica.host, replica.port, dialect.routes_path, timeout_s=timeout_s, api_key=api_key
        )
        if models.status != 200:
            return None
        return Served(_read_models(models.body), _read_routes(replica, routes.status, routes.body))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_models(body: bytes) -> tuple[ServedModel, ...]:
    listed: Any = msgspec.json.decode(body)
    return tuple(
        ServedModel(str(card["id"]), card.get("parent"), card.get("max_model_len"))
        for card in listed["data"]
    )


def _read_routes(replica: Replica, status: int, body: bytes) -> frozenset[str]:
    """The engine's OpenAPI document; where it is switched off, whatever the dialect can offer."""
    if status != 200:
        return replica.dialect.default_paths
    document: Any = msgspec.json.decode(body)
    return replica.dialect.offered_paths(document["paths"])
