"""What others do with adapters, by their published sources.

Owns one class a policy. All evict the least recently used version of the replica, idle ones first,
as the engines do; where a policy leaves a choice of replica open, the least loaded gets the request.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from adapters.placement_board import rendezvous
from benchmarks.adapter_placement import model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.adapter_placement.fleet import Fleet
    from benchmarks.adapter_placement.replica import Request

_ALL = range(model.NUM_REPLICAS)


def _ranking(version: model.Version) -> list[int]:
    """Replicas by rendezvous weight, the preferred first."""
    return sorted(_ALL, key=lambda index: -rendezvous(version.name, str(index)))


class LruPolicy:
    """What these policies share: eviction, and nothing to do at a tick."""

    name = ""
    tick_s = 3600.0

    def victim(self, replica: int, fleet: Fleet) -> int | None:
        """The least recently used."""
        return fleet.replicas[replica].least_recently_used()

    def tick(self, fleet: Fleet) -> None:
        """Nothing."""


class AllPods(LruPolicy):
    """Every adapter on every replica, loaded when asked for: KServe, production-stack."""

    name = "all-pods"

    def route(self, request: Request, fleet: Fleet) -> int:
        """The least loaded replica."""
        del request
        return fleet.least_loaded(_ALL)


class Hash(LruPolicy):
    """Each adapter on one replica, by rendezvous hashing of its name."""

    name = "hash"

    def __init__(self, versions: Sequence[model.Version]) -> None:
        self._homes = [_ranking(version)[0] for version in versions]

    def route(self, request: Request, fleet: Fleet) -> int:
        """The adapter's replica."""
        del fleet
        return self._homes[request.arrival.version]


class BoundedHash(LruPolicy):
    """Rendezvous hashing with bounded loads: on to the next replica while one has too much.

    Source: Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018, with
    the bound of 1.25 times the mean that is usual in proxies.
    """

    name = "hash, bounded"
    _BOUND = 1.25

    def __init__(self, versions: Sequence[model.Version]) -> None:
        self._rankings = [_ranking(version) for version in versions]

    def route(self, request: Request, fleet: Fleet) -> int:
        """The first of the adapter's replicas that is within the bound with this request."""
        tokens = [one.load_tokens for one in fleet.replicas]
        own = request.estimated_tokens
        bound = self._BOUND * (sum(tokens) + own) / len(tokens)
        for index in self._rankings[request.arrival.version]:
            if tokens[index] + own <= max(bound, own):
                return index
        return fleet.least_loaded(_ALL)


class LeastAdapters(LruPolicy):
    """Each adapter on the one replica that had the fewest when it was registered: AIBrix's default."""

    name = "least-adapters"

    def route(self, request: Request, fleet: Fleet) -> int:
        """The adapter's replica: they were registered one after the other."""
        del fleet
        return request.arrival.version % model.NUM_REPLICAS


class Dynamo(LruPolicy):
    """Dynamo's LoRA controller with its defaults (`lib/llm/src/lora/{controller,config,filter}.rs`).

    Every 3 s: load = moving average (0.3) of the arrivals of the last 90 s; copies =
    clamp(ceil(load / total · slots), 1, replicas), normalised to the slots; replicas by rendezvous
    hash; three ticks between scale-downs; an idle adapter is pinned to its first replica; an active one
    beyond the slots stays where it is loaded, else on its first replica. Requests go to the least
    loaded of an adapter's replicas that has it, else of all of its replicas.

    The sources load an adapter when a request comes to a replica without it, and send no request there
    while another replica of the set has it: further copies would never come to be. Here the controller
    loads missing further copies itself at each tick, to its advantage.
    """

    name = "dynamo"
    tick_s = 3.0
    _SLOTS = model.NUM_REPLICAS * model.GPU_SLOTS
    _ALPHA = 0.3
    _WINDOW_TICKS = 30
    _COOLDOWN_TICKS = 3

    def __init__(self, versions: Sequence[model.Version]) -> None:
        self._rankings = [_ranking(version) for version in versions]
        self._sets = [ranking[:1] for ranking in self._rankings]
        self._is_dropped = [False] * len(versions)
        self._averages = [0.0] * len(versions)
        self._counts: deque[dict[int, int]] = deque([{}], maxlen=self._WINDOW_TICKS)
        self._window = [0] * len(versions)
        self._scaled_down: dict[int, int] = {}
        self._num_ticks = 0

    def route(self, request: Request, fleet: Fleet) -> int:
        """A replica of the adapter's set, preferring those that have it."""
        version = request.arrival.version
        counts = self._counts[-1]
        counts[version] = counts.get(version, 0) + 1
        self._window[version] += 1
        if self._is_dropped[version]:
            warm = [i for i in self._sets[version] if version in fleet.replicas[i].ready]
            return fleet.least_loaded(warm or self._rankings[version][:1])
        ready = [i for i in self._sets[version] if version in fleet.replicas[i].ready]
        return fleet.least_loaded(ready or self._sets[version])

    def tick(self, fleet: Fleet) -> None:
        """Recomputes all sets and loads the missing copies of adapters with several."""
        self._num_ticks += 1
        for version, count in enumerate(self._window):
            self._averages[version] += self._ALPHA * (count - self._averages[version])
        loads = {
            version: round(average)
            for version, average in enumerate(self._averages)
            if average >= 0.5
        }
        copies = self._copies(loads)
        for version, ranking in enumerate(self._rankings):
            self._is_dropped[version] = version in loads and version not in copies
            if version in copies:
                wanted = self._calmed(version, copies[version])
                self._sets[version] = ranking[:wanted]
            elif version not in loads:
                self._sets[version] = ranking[:1]
                self._scaled_down.pop(version, None)
        if len(self._counts) == self._WINDOW_TICKS:
            for version, count in self._counts[0].items():
                self._window[version] -= count
        self._counts.append({})
        for version in copies:
            if len(self._sets[version]) > 1:
                self._load_missing(version, fleet)

    def _load_missing(self, version: int, fleet: Fleet) -> None:
        for index in self._sets[version]:
            replica = fleet.replicas[index]
            if version in replica.used_s:
                continue
            evicted = replica.least_recently_used() if replica.is_full else None
            if evicted is not None or not replica.is_full:
                fleet.load(index, version, evicted)

    def _copies(self, loads: Mapping[int, int]) -> dict[int, int]:
        """Copies of each active adapter that fits into the slots."""
        active = sorted(loads, key=lambda version: (-loads[version], version))[: self._SLOTS]
        total = sum(loads[version] for version in active)
        wanted: dict[int, float] = {
            version: min(
                model.NUM_REPLICAS, max(1, math.ceil(loads[version] / total * self._SLOTS))
            )
            for version in active
        }
        if (asked := sum(wanted.values())) <= self._SLOTS:
            return {version: int(copies) for version, copies in wanted.items()}
        wanted = {
            version: max(1.0, copies * self._SLOTS / asked) for version, copies in wanted.items()
        }
        copies = {version: int(exact) for version, exact in wanted.items()}
        left = max(0, self._SLOTS - sum(copies.values()))
        growing = [version for version in wanted if copies[version] < model.NUM_REPLICAS]
        for version in sorted(growing, key=lambda one: (copies[one] - wanted[one], one))[:left]:
            copies[version] += 1
        return copies

    def _calmed(self, version: int, wanted: int) -> int:
        """The copies after the cooldown of scale-downs."""
        current = len(self._sets[version])
        if wanted >= current:
            self._scaled_down.pop(version, None)
            return wanted
        since = self._scaled_down.setdefault(version, self._num_ticks)
        if self._num_ticks - since < self._COOLDOWN_TICKS:
            return current
        self._scaled_down[version] = self._num_ticks
        return wanted
