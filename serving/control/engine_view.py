"""What the control plane knows of the fleet: engines' limits, base models, who answers.

Owns the interface, and the answers that the settings alone give. Whoever watches the replicas may
know more and stand in for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adapters.base_model import read_base_model
from adapters.compat import EngineLimits
from adapters.errors import InvalidBaseModel
from serving.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapters.base_model import BaseModel
    from serving.config import ReplicaConfig
    from serving.control.reconcile import Reconciler
    from serving.control.replica_sync import ReplicaSync
    from serving.control.settings import ControlSettings


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica.

    Attributes:
        name: `host:port`.
        engine: Its kind.
        is_reachable: Whether it answered last; None if nobody asked.
        reason: Why it is not.
    """

    name: str
    engine: str
    is_reachable: bool | None = None
    reason: str | None = None


class EngineView(Protocol):
    """The fleet, as registration and the routes see it; may be asked from any thread."""

    def limits(self) -> Sequence[EngineLimits]:
        """How the replicas were launched; one entry for those that are alike."""

    def replicas(self) -> Sequence[ReplicaView]:
        """Every replica of the fleet."""

    def is_base(self, name: str) -> bool:
        """Whether replicas serve a base model of this public name."""

    def base_names(self) -> frozenset[str]:
        """Public names of the base models that are known."""

    def bases(self) -> Mapping[str, BaseModel]:
        """The base models whose folders are at hand, for the linter."""


class FleetEngines:
    """The fleet as the settings describe it, and as the reconciler sees it while it runs."""

    def __init__(self, settings: ControlSettings) -> None:
        """Read the base models' folders.

        Raises:
            ConfigError: If one is not a base model's.
        """
        self._settings = settings
        self._reconciler: Reconciler | None = None
        self._bases: dict[str, BaseModel] = {}
        for name, folder in settings.base_models.items():
            try:
                self._bases[name] = read_base_model(folder, name)
            except InvalidBaseModel as error:
                raise ConfigError(f"--base-model {name}={folder}: {error}") from error

    def watch(self, reconciler: Reconciler | None) -> None:
        """Believe this reconciler's view of the replicas from now on."""
        self._reconciler = reconciler

    def limits(self) -> Sequence[EngineLimits]:
        """One entry an engine kind, with the settings' rank and slots."""
        kinds = dict.fromkeys(replica.kind for replica in self._settings.replicas)
        rank, slots = self._settings.max_lora_rank, self._settings.max_loras
        return [EngineLimits(kind=kind, max_lora_rank=rank, max_loras=slots) for kind in kinds]

    def replicas(self) -> Sequence[ReplicaView]:
        """Those of the settings; whether they answer is known while the reconciler runs."""
        return [self._view(replica) for replica in self._settings.replicas]

    def is_base(self, name: str) -> bool:
        """Whether it is known; as long as none is, whatever is named is believed."""
        names = self.base_names()
        return not names or name in names

    def base_names(self) -> frozenset[str]:
        """Those of the settings, and those that replicas have said to serve."""
        return frozenset(self._bases) | {one.base for one in self._synced().values() if one.base}

    def bases(self) -> Mapping[str, BaseModel]:
        """Those of the settings."""
        return self._bases

    def _synced(self) -> Mapping[str, ReplicaSync]:
        return {} if self._reconciler is None else self._reconciler.replicas

    def _view(self, replica: ReplicaConfig) -> ReplicaView:
        synced = self._synced().get(replica.name)
        if synced is None:
            return ReplicaView(replica.name, replica.kind)
        is_up = synced.swap.is_up
        reason = None if is_up else "It does not answer what it has."
        return ReplicaView(replica.name, replica.kind, is_up, reason)
