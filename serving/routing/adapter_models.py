"""Published aliases and versions as models of this fleet, each made when it is first asked for.

Immutable but for its memory of what it has made: a change of a thousand versions costs their
look-ups, not a thousand models. Belongs to a `Snapshot`; never asks an engine or the control plane.

A version may be routed to a replica if the published snapshot says `ready` there, the engine itself
lists it (where its kind lists any), and nothing has cast doubt on the pair since.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from serving.routing.snapshot import Adapter, Model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.routing.published import Published, PublishedVersion
    from serving.routing.snapshot import Replica


class Standing(NamedTuple):
    """What is known of the adapters of one replica, apart from what is published.

    Attributes:
        listed: Versions that its engine listed last; None where its kind lists none.
        doubted: Versions that failed there, or were lost, and have not been confirmed since.
    """

    listed: frozenset[str] | None
    doubted: frozenset[str] = frozenset()

    def may_serve(self, version: str) -> bool:
        """Whether nothing speaks against routing a version there."""
        return version not in self.doubted and (self.listed is None or version in self.listed)


class AdapterModels:
    """What `Snapshot.find` falls back to."""

    __slots__ = ("_aliases", "_bases", "_made", "_replicas", "_standings", "published")

    def __init__(
        self,
        published: Published,
        bases: Mapping[str, Model],
        replicas: Mapping[int, Replica],
        standings: Mapping[int, Standing],
        aliases: Mapping[str, str],
    ) -> None:
        """Makes nothing yet.

        Args:
            published: What the control plane says.
            bases: Public name → model, of what the engines offer of their own.
            replicas: Index → replica, healthy or not.
            standings: Index of each of them → what is known of the adapters there.
            aliases: Aliases of the configuration; a published one of the same name beats them.
        """
        self.published = published
        self._bases = bases
        self._replicas = replicas
        self._standings = standings
        self._aliases = aliases
        self._made: dict[str, Model] = {}

    def find(self, name: str) -> Model | None:
        """The model of a published alias or version, or None."""
        model = self._made.get(name)
        if model is None:
            model = self._make(name)
            if model is not None:
                self._made[name] = model
        return model

    def target_of(self, alias: str) -> str | None:
        """What an alias points at."""
        found = self.published.aliases.get(alias)
        return self._aliases.get(alias) if found is None else found.target

    def aliases(self) -> list[str]:
        """Every alias that `find` may know and the engines' own models do not hide."""
        names = self.published.aliases.keys() | self._aliases.keys()
        return sorted(name for name in names if name not in self._bases)

    def _make(self, name: str) -> Model | None:
        version = self.published.versions.get(name)
        if version is not None:
            return self._version(name, version)
        target = self.target_of(name)
        if target is None:
            return None
        base = self._bases.get(target)
        if base is not None:
            return replace(base, name=name, label=name)
        if target not in self.published.versions:
            return None
        model = self.find(target)
        return None if model is None else replace(model, name=name, label=name)

    def _version(self, name: str, version: PublishedVersion) -> Model:
        label = name.partition("@")[0] + "@*"
        adapter = Adapter(name, version.lora_id, version.size_bytes, self._paths(version))
        base = self._bases.get(version.base)
        if base is None:
            return Model(name, name, {}, None, version.base, {}, frozenset(), adapter, label)
        engine_names = {
            index: self._replicas[index].dialect.engine_name(name, base_name)
            for index, base_name in base.engine_names.items()
        }
        ready = self._ready(name, version)
        healthy = {
            path: tuple(replica for replica in replicas if replica.index in ready)
            for path, replicas in base.healthy.items()
        }
        max_len = base.max_model_len
        return Model(
            name, name, engine_names, max_len, base.name, healthy, base.offered, adapter, label
        )

    def _paths(self, version: PublishedVersion) -> dict[int, str]:
        placements = version.placements
        return {
            index: placements[replica.name].path
            for index, replica in self._replicas.items()
            if replica.name in placements
        }

    def _ready(self, name: str, version: PublishedVersion) -> frozenset[int]:
        placements = version.placements
        return frozenset(
            index
            for index, replica in self._replicas.items()
            if (placement := placements.get(replica.name)) is not None
            and placement.state == "ready"
            and self._standings[index].may_serve(name)
        )
