"""The fleet in virtual time: arrivals, the policy's decisions, what came of them.

Owns the clock. The policy sees the fleet through this class and changes it only by `load`. Used by `study.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from benchmarks.adapter_placement import model
from benchmarks.adapter_placement.replica import Replica, Request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.adapter_placement.workload import Workload


class Policy(Protocol):
    """What is compared.

    Attributes:
        name: In tables.
        tick_s: How often `tick` is called.
    """

    name: str
    tick_s: float

    def route(self, request: Request, fleet: Fleet) -> int:
        """Index of the replica that a request goes to."""

    def victim(self, replica: int, fleet: Fleet) -> int | None:
        """Version that a full replica forgets for the request just routed there; None to wait."""

    def tick(self, fleet: Fleet) -> None:
        """Time to reconsider."""


class Fleet:
    """Replicas under one policy.

    Attributes:
        now_s: Virtual time.
        replicas: Their states.
        versions: All adapters.
        num_loads: Loads asked for since `measured_from_s`.
        num_loads_ahead: Those of them that no request waited for when they were asked for.
        requests: All that arrived since `measured_from_s`.
    """

    def __init__(self, workload: Workload, policy: Policy, measured_from_s: float) -> None:
        self.now_s = 0.0
        self.versions = workload.versions
        self.replicas = [Replica(workload.versions) for _ in range(model.NUM_REPLICAS)]
        self.num_loads = 0
        self.num_loads_ahead = 0
        self.requests: list[Request] = []
        self._arrivals = workload.arrivals
        self._policy = policy
        self._measured_from_s = measured_from_s
        self._served_before = [0] * model.NUM_REPLICAS
        self._activations_before = 0
        self._blocked: list[list[Request]] = [[] for _ in self.replicas]

    def least_loaded(self, candidates: Iterable[int]) -> int:
        """Of some replicas, the one with the fewest outstanding tokens; the first by index of equals."""
        replicas = self.replicas
        return min(candidates, key=lambda index: (replicas[index].load_tokens, index))

    def load(self, index: int, version: int, evict: int | None) -> None:
        """Loads a version ahead of requests, which wait if they come sooner."""
        if evict is not None:
            self.replicas[index].unregister(evict)
        self._register(index, version)
        self.num_loads_ahead += self.now_s >= self._measured_from_s

    def run(self) -> None:
        """Plays all arrivals and whatever they leave behind."""
        next_tick_s = self._policy.tick_s
        is_warm = False
        for arrival in self._arrivals:
            while next_tick_s <= arrival.at_s:
                self._advance(next_tick_s)
                self._policy.tick(self)
                next_tick_s += self._policy.tick_s
            self._advance(arrival.at_s)
            if not is_warm and arrival.at_s >= self._measured_from_s:
                is_warm = True
                self._served_before = [one.served_tokens for one in self.replicas]
                self._activations_before = self._all_activations()
            self._arrive(Request(arrival))
        self._advance(math.inf)

    def served_tokens(self) -> list[int]:
        """Tokens that each replica served since `measured_from_s`."""
        return [
            one.served_tokens - before
            for one, before in zip(self.replicas, self._served_before, strict=True)
        ]

    def num_activations(self) -> int:
        """GPU slots filled since `measured_from_s`."""
        return self._all_activations() - self._activations_before

    def _all_activations(self) -> int:
        return sum(one.num_activations for one in self.replicas)

    def _advance(self, until_s: float) -> None:
        replicas = self.replicas
        while True:
            next_s, index = math.inf, -1
            for number, one in enumerate(replicas):
                soonest_s = one.step_s if one.step_s < one.loaded_s else one.loaded_s
                if soonest_s < next_s:
                    next_s, index = soonest_s, number
            if next_s > until_s or index < 0:
                break
            self.now_s = next_s
            replica = replicas[index]
            if replica.loaded_s <= replica.step_s:
                replica.finish_load(next_s)
                self._unblock(index)
            else:
                replica.finish_step(next_s)
        if until_s < math.inf:
            self.now_s = until_s

    def _arrive(self, request: Request) -> None:
        if self.now_s >= self._measured_from_s:
            self.requests.append(request)
        index = self._policy.route(request, self)
        self._serve(index, request)

    def _serve(self, index: int, request: Request) -> None:
        replica = self.replicas[index]
        version = request.arrival.version
        if version not in replica.used_s:
            if replica.is_full:
                evicted = self._policy.victim(index, self)
                if evicted is None:
                    # Everything is being loaded for somebody else: the next to be ready goes.
                    self._blocked[index].append(request)
                    return
                replica.unregister(evicted)
            self._register(index, version)
        replica.accept(request, self.now_s)

    def _unblock(self, index: int) -> None:
        blocked, self._blocked[index] = self._blocked[index], []
        for request in blocked:
            self._serve(index, request)

    def _register(self, index: int, version: int) -> None:
        self.replicas[index].register(version, self.now_s)
        self.num_loads += self.now_s >= self._measured_from_s
