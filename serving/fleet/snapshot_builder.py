"""From what is known of each replica to what routing reads; pure. Called by `registry.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.routing.snapshot import Model, Replica, Snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serving.fleet.learn import Served, ServedModel


def build_snapshot(
    *,
    version: int,
    served: Mapping[Replica, Served],
    healthy: frozenset[int],
    aliases: Mapping[str, str],
    replica_health: Mapping[str, bool],
) -> Snapshot:
    """Builds the snapshot.

    Args:
        version: Of the new snapshot.
        served: What each replica serves, by its last answer: one that is down keeps its models.
        healthy: Indexes of the replicas that take requests.
        aliases: Public name → served name; one whose target nobody serves is left out.
        replica_health: Replica name → healthy.
    """
    by_name: dict[str, list[tuple[Replica, ServedModel]]] = {}
    for replica, answer in served.items():
        for model in answer.models:
            by_name.setdefault(model.name, []).append((replica, model))
    models = {
        name: _model(name, name, holders, served, healthy) for name, holders in by_name.items()
    }
    for alias, target in aliases.items():
        if target in by_name:
            models[alias] = _model(alias, target, by_name[target], served, healthy)
    bases = [m for m in models.values() if m.parent is None and m.name not in aliases]
    return Snapshot(
        version=version,
        models=models,
        routable={replica.index: replica for replica in served if replica.index in healthy},
        default_model=bases[0] if len(bases) == 1 else None,
        is_complete=len(served) == len(replica_health),
        is_ready=any(any(model.healthy.values()) for model in models.values()),
        replica_health=replica_health,
    )


def _model(
    name: str,
    version: str,
    holders: Sequence[tuple[Replica, ServedModel]],
    served: Mapping[Replica, Served],
    healthy: frozenset[int],
) -> Model:
    offered = frozenset[str]().union(*(served[replica].offered for replica, _ in holders))
    by_path = {
        path: tuple(r for r, _ in holders if r.index in healthy and path in served[r].offered)
        for path in offered
    }
    first = holders[0][1]
    engine_names = {
        replica.index: replica.dialect.engine_name(version, model.parent)
        for replica, model in holders
    }
    return Model(name, version, engine_names, first.max_model_len, first.parent, by_path, offered)
