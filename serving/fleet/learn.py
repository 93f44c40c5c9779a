"""What a replica serves, asked of the replica itself: its models and its routes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from adapters.errors import InvalidName
from adapters.version import parse_version
from serving.fleet.http_client import get, post_json

if TYPE_CHECKING:
    from serving.fleet.http_client import Got
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
        versions: Names of the adapters among them that are called like a version (`name@digest12`).
        own: The others.
    """

    models: tuple[ServedModel, ...]
    offered: frozenset[str]
    versions: frozenset[str] = field(init=False, compare=False)
    own: tuple[ServedModel, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        versions = frozenset(
            model.name
            for model in self.models
            if model.parent is not None and is_version(model.name)
        )
        own = tuple(model for model in self.models if model.name not in versions)
        object.__setattr__(self, "versions", versions)
        object.__setattr__(self, "own", own)


def is_version(name: str) -> bool:
    """Whether a name is that of an adapter version (`name@digest12`)."""
    try:
        return str(parse_version(name)) == name
    except InvalidName:
        return False


async def is_healthy(replica: Replica, *, timeout_s: float, api_key: str | None) -> bool:
    """Whether the replica's health route answers 200 in time."""
    try:
        got = await _ask(replica, replica.dialect.health_path, timeout_s, api_key)
    except (OSError, UnicodeError):  # a host that cannot be a name is a UnicodeError
        return False
    return got.status == 200


async def generates(
    replica: Replica, served: Served, *, timeout_s: float, api_key: str | None
) -> bool:
    """Whether the replica generates a token now: what its health route does not prove.

    vLLM's stays 200 while it is paused (requests hang) and while it drains (they get 500).

    Raises:
        TimeoutError: If it has not answered in time: paused, or busy.
    """
    dialect = replica.dialect
    base = next((model for model in served.models if model.parent is None), None)
    canary = dialect.canary(base.name, served.offered) if base is not None else None
    if canary is None:
        return True
    try:
        got = await post_json(
            replica.host,
            replica.port,
            canary.path,
            canary.body,
            timeout_s=timeout_s,
            api_key=api_key,
            tls=replica.tls,
        )
    except TimeoutError:
        raise
    except (OSError, UnicodeError):
        return False
    # A refusal (an unknown field, a full queue) is an answer of an engine that works.
    return got.status < 500 or got.status == 503


async def learn(replica: Replica, *, timeout_s: float, api_key: str | None) -> Served | None:
    """Asks a replica for its models and routes; None if it does not answer as it should."""
    dialect = replica.dialect
    try:
        models = await _ask(replica, dialect.models_path, timeout_s, api_key)
        routes = await _ask(replica, dialect.routes_path, timeout_s, api_key)
        if models.status != 200:
            return None
        return Served(_read_models(models.body), _read_routes(replica, routes.status, routes.body))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


async def learn_models(
    replica: Replica, before: Served, *, timeout_s: float, api_key: str | None
) -> Served | None:
    """Asks a replica for its models again; its routes do not change while it runs."""
    try:
        models = await _ask(replica, replica.dialect.models_path, timeout_s, api_key)
        if models.status != 200:
            return None
        return replace(before, models=_read_models(models.body))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


async def _ask(replica: Replica, path: str, timeout_s: float, api_key: str | None) -> Got:
    return await get(
        replica.host, replica.port, path, timeout_s=timeout_s, api_key=api_key, tls=replica.tls
    )


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
