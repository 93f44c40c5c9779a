"""From what is known of each replica to what routing reads; pure. Called by `registry.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.routing.adapter_models import AdapterModels
from serving.routing.snapshot import Model, Replica, Snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serving.fleet.learn import Served, ServedModel
    from serving.routing.adapter_models import Standing
    from serving.routing.published import Published


def build_snapshot(
    *,
    version: int,
    served: Mapping[Replica, Served],
    healthy: frozenset[int],
    aliases: Mapping[str, str],
    replica_health: Mapping[str, bool],
    published: Published | None = None,
    standings: Mapping[int, Standing] | None = None,
    is_controlled: bool = False,
) -> Snapshot:
    """Builds the snapshot.

    Args:
        version: Of the new snapshot.
        served: What each replica serves, by its last answer: one that is down keeps its models.
        healthy: Indexes of the replicas that take requests.
        aliases: Public name → served name; one whose target nobody serves is left out, and so is
            one that is published too.
        replica_health: Replica name → healthy.
        published: What the control plane says, if it has said anything.
        standings: Replica index → what is known of the published versions there.
        is_controlled: Whether there is a control plane. Then what is called like a version is its
            business, and hidden unless it is published.
    """
    by_name: dict[str, list[tuple[Replica, ServedModel]]] = {}
    for replica, answer in served.items():
        for model in answer.own if is_controlled else answer.models:
            by_name.setdefault(model.name, []).append((replica, model))
    models = {
        name: _model(name, name, holders, served, healthy) for name, holders in by_name.items()
    }
    for alias, target in aliases.items():
        if target in by_name and (published is None or alias not in published.aliases):
            models[alias] = _model(alias, target, by_name[target], served, healthy)
    bases = [m for m in models.values() if m.parent is None and m.name not in aliases]
    adapters = None
    if published is not None:
        replicas = {replica.index: replica for replica in served}
        adapters = AdapterModels(published, models, replicas, standings or {}, aliases)
    return Snapshot(
        version=version,
        models=models,
        routable={replica.index: replica for replica in served if replica.index in healthy},
        default_model=bases[0] if len(bases) == 1 else None,
        is_complete=len(served) == len(replica_health)
        and (published is not None or not is_controlled),
        is_ready=any(any(model.healthy.values()) for model in models.values()),
        replica_health=replica_health,
        adapters=adapters,
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
