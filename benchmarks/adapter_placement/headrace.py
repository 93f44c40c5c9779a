"""Our own placement in the simulated fleet: `adapters.placement` and `adapters.demand`, unchanged.

Owns the translation between the two. The routing is the gateway's: the least loaded replica that has
the version; where none has it, the replica that `place_cold` names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.demand import DEFAULT_HALF_LIFE_S, Demand
from adapters.placement import Limits, ReplicaCapacity, VersionDemand, place_cold, plan
from benchmarks.adapter_placement import model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.adapter_placement.fleet import Fleet
    from benchmarks.adapter_placement.replica import Request

_BASE = "base"
_REFRESH_S = 2.0
"""How old the demand may be that a cold placement is decided on; its own version's is fresh."""
_NOTHING: frozenset[str] = frozenset()


class Headrace:
    """Planned placement with cold loads by value."""

    name = "headrace"

    def __init__(
        self,
        versions: Sequence[model.Version],
        limits: Limits | None = None,
        half_life_s: float = DEFAULT_HALF_LIFE_S,
        tick_s: float = 5.0,
    ) -> None:
        self.tick_s = tick_s
        self._limits = limits or Limits()
        self._versions = versions
        self._numbers = {version.name: number for number, version in enumerate(versions)}
        self._demand = Demand(half_life_s)
        self._demands: list[VersionDemand] = []
        self._refreshed_s = -_REFRESH_S
        self._evict: int | None = None

    def route(self, request: Request, fleet: Fleet) -> int:
        """The least loaded replica that has the version, else where it should be loaded."""
        version = request.arrival.version
        name = self._versions[version].name
        self._demand.add(name, 1.0, request.estimated_tokens, fleet.now_s)
        ready = [i for i, one in enumerate(fleet.replicas) if version in one.ready]
        if ready:
            return fleet.least_loaded(ready)
        if fleet.now_s - self._refreshed_s >= _REFRESH_S:
            self._refresh(fleet.now_s)
        self._demands[version] = self._demand_of(version, fleet.now_s)
        chosen = place_cold(
            self._demands[version], self._demands, self._capacities(fleet), self._limits
        )
        if chosen is None:
            self._evict = None
            return fleet.least_loaded(range(len(fleet.replicas)))
        self._evict = None if chosen.evict is None else self._numbers[chosen.evict]
        return int(chosen.replica)

    def victim(self, replica: int, fleet: Fleet) -> int | None:
        """What `place_cold` said; the least recently used if that is gone meanwhile."""
        ready = fleet.replicas[replica].ready
        if self._evict in ready:
            return self._evict
        return fleet.replicas[replica].least_recently_used()

    def tick(self, fleet: Fleet) -> None:
        """Follows the plan."""
        self._refresh(fleet.now_s)
        moves = plan(self._demands, self._capacities(fleet), self._limits)
        leaving: dict[int, list[int]] = {}
        for move in moves.unloads:
            number, index = self._numbers[move.version], int(move.replica)
            if number in fleet.replicas[index].ready:
                leaving.setdefault(index, []).append(number)
        for move in moves.loads:
            index = int(move.replica)
            gone = leaving.get(index, [])
            if fleet.replicas[index].is_full and not gone:
                continue
            evict = gone.pop(0) if gone else None
            fleet.load(index, self._numbers[move.version], evict)

    def _refresh(self, now_s: float) -> None:
        self._demands = [self._demand_of(number, now_s) for number in range(len(self._versions))]
        self._refreshed_s = now_s

    def _demand_of(self, number: int, now_s: float) -> VersionDemand:
        version = self._versions[number]
        rate = self._demand.rate(version.name, now_s)
        return VersionDemand(
            version=version.name,
            base=_BASE,
            requests_per_s=rate.requests_per_s,
            tokens_per_s=rate.tokens_per_s,
            rank=version.rank,
            size_bytes=version.size_bytes,
            load_s=version.load_s,
            min_copies=0,
            idle_s=rate.idle_s,
        )

    def _capacities(self, fleet: Fleet) -> list[ReplicaCapacity]:
        names = [version.name for version in self._versions]
        return [
            ReplicaCapacity(
                name=str(index),
                base=_BASE,
                gpu_slots=model.GPU_SLOTS,
                max_registered=model.MAX_REGISTERED,
                resident=frozenset(names[version] for version in one.used_s),
                unloadable=_NOTHING,
                draining=_NOTHING,
                is_healthy=True,
                load_tokens=one.load_tokens,
            )
            for index, one in enumerate(fleet.replicas)
        ]
