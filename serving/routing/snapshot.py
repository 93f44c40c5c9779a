"""What routing decides on: an immutable picture of the fleet at one moment.

Built by `serving/fleet/registry.py` at every change; read by the hot path without a lock, since a
new snapshot replaces the old one in a single assignment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

    from serving.engines.base import Dialect
    from serving.routing.adapter_models import AdapterModels


@dataclass(frozen=True, slots=True)
class Replica:
    """One running engine process.

    Attributes:
        index: Its place in the fleet; the same in all workers.
        name: Label in metrics and logs.
        dialect: How its engine wants to be spoken to.
        tls: How it is verified; None speaks plain HTTP.
    """

    index: int
    name: str
    host: str
    port: int
    dialect: Dialect
    tls: ssl.SSLContext | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published adapter version, as requests for it have to name it.

    Attributes:
        version: `name@digest12`.
        lora_id: Unique number, for engines whose caches are keyed by it.
        size_bytes: Of its files: what a load moves.
        paths: Replica index → its folder as that replica's engine sees it.
    """

    version: str
    lora_id: int
    size_bytes: int
    paths: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Model:
    """A public model name and who can answer for it.

    Attributes:
        name: What clients send.
        version: What an alias stands for; equal to `name` for all others. Clients read it as the
            `model` of a response, as OpenAI answers an alias with a dated snapshot.
        engine_names: Replica index → what that replica's engine calls the model.
        max_model_len: Context length in tokens, where the engine tells.
        parent: Base model of an adapter, else None.
        healthy: Endpoint path → healthy replicas that serve the model and offer the endpoint.
        offered: Endpoint paths that any replica of the model offers, healthy or not.
        adapter: The published version behind it; None for all that engines offer of their own.
        label: What its requests are counted under. Versions that are named directly share one label
            an adapter: there is no end of them.
    """

    name: str
    version: str
    engine_names: Mapping[int, str]
    max_model_len: int | None
    parent: str | None
    healthy: Mapping[str, tuple[Replica, ...]]
    offered: frozenset[str]
    adapter: Adapter | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The fleet at one moment.

    Attributes:
        version: Grows by one with every change.
        models: Public name → model, of what engines offer of their own; `find` knows the rest too.
        routable: Index → replica, of those that take requests.
        default_model: The only base model of the fleet, for routes whose `model` is optional.
        is_complete: Whether the models of every replica have been learnt, and the adapters.
        is_ready: Whether a first request would be answered.
        replica_health: Replica name → healthy now.
        adapters: The published aliases and versions; None without a control plane.
    """

    version: int = 0
    models: Mapping[str, Model] = field(default_factory=dict)
    routable: Mapping[int, Replica] = field(default_factory=dict)
    default_model: Model | None = None
    is_complete: bool = False
    is_ready: bool = False
    replica_health: Mapping[str, bool] = field(default_factory=dict)
    adapters: AdapterModels | None = None

    def find(self, name: str) -> Model | None:
        """The model of a public name. What engines offer of their own comes first."""
        model = self.models.get(name)
        if model is None and self.adapters is not None:
            return self.adapters.find(name)
        return model
