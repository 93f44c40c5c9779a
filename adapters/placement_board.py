"""The board on which a plan is made: who has what, what each copy is worth, what each replica carries.

Owns the bookkeeping and the formulas of `placement.py`, its only caller; decides nothing. No I/O.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapters.placement_view import Limits, ReplicaCapacity, VersionDemand

_FILL_WEIGHT = 0.1
"""How much a full replica counts against an empty one: breaks ties between versions nobody asks for."""


class Board:
    """The replicas of one base model while a plan is made.

    Attributes:
        versions: By name; only those of this base model.
        replicas: The healthy ones that take adapters, by name.
        placed: Replica → versions it is to have.
        holders: Version → replicas that are to have it.
    """

    def __init__(
        self,
        versions: Sequence[VersionDemand],
        replicas: Sequence[ReplicaCapacity],
        limits: Limits,
    ) -> None:
        """Starts from what is resident, as far as it is wanted.

        Args:
            versions: Of one base model.
            replicas: Of that base model; those that can take nothing are left out.
            limits: The caller's.
        """
        self.limits = limits
        self.versions: dict[str, VersionDemand] = {one.version: one for one in versions}
        usable = (
            replace(one, resident=one.resident - one.draining)
            for one in replicas
            if one.is_healthy and one.gpu_slots > 0 and one.max_registered > 0
        )
        self.replicas: dict[str, ReplicaCapacity] = {
            one.name: one for one in sorted(usable, key=lambda one: one.name)
        }
        self.placed: dict[str, set[str]] = {name: set() for name in self.replicas}
        self.holders: dict[str, set[str]] = {name: set() for name in self.versions}
        for one in self.replicas.values():
            for version in one.resident - one.unloadable:
                if version in self.versions:
                    self.add(version, one.name)
        self.fair_tokens_per_s = sum(one.tokens_per_s for one in versions) / max(
            1, len(self.replicas)
        )

    # What is where.

    def add(self, version: str, replica: str) -> None:
        """Puts a copy on a replica."""
        self.placed[replica].add(version)
        self.holders[version].add(replica)

    def remove(self, version: str, replica: str) -> None:
        """Takes a copy away."""
        self.placed[replica].discard(version)
        self.holders[version].discard(replica)

    def room(self, replica: str) -> int:
        """Versions that a replica can still take; below zero where it has too many."""
        one = self.replicas[replica]
        return one.max_registered - len(one.draining) - len(self.placed[replica])

    def can_load(self, version: str, replica: str) -> bool:
        """Whether a version that is not on a replica may come there."""
        one = self.replicas[replica]
        return (
            version not in self.placed[replica]
            and version not in one.unloadable
            and version not in one.draining
        )

    # What a copy is worth.

    def copies_wanted(self, version: str, slack: float = 0.0) -> int:
        """How many copies the load of a version asks for, at least 1.

        A copy carries at most `max_share` of what a replica carries on average. No more than that: each
        further copy puts one more adapter into the batches of one more replica, and a decode step
        reads the weights of every adapter in its batch besides the base model's.

        Args:
            version: Its name.
            slack: Share by which the load is taken to be greater: with it, the copies to keep.
        """
        one = self.versions[version]
        carried = max(self.limits.max_share * self.fair_tokens_per_s, self.limits.copy_tokens_per_s)
        wanted = math.ceil(one.tokens_per_s * (1 + slack) / carried) if carried else 1
        return max(1, min(wanted, len(self.replicas)))

    def worth(self, version: str, copy: int) -> float:
        """Load seconds that the n-th copy of a version keeps off the request path each second.

        Requests would each wait `load_s` without the first copy; the n-th spares 1/n of them a wait
        behind the others, as harmonic shares do for the marginal value of replicas (concave in n, so
        that greedy choice by marginal value is optimal for the sum).
        """
        one = self.versions[version]
        return one.requests_per_s * one.load_s / copy

    def gain(self, version: str) -> float:
        """Worth of one more copy of a version; 0 where none is wanted."""
        one = self.versions[version]
        copy = len(self.holders[version]) + 1
        if one.idle_s >= self.limits.idle_unload_s or copy > self.copies_wanted(version):
            return 0.0
        return self.worth(version, copy)

    def loss(self, version: str) -> float:
        """What is lost with one copy of a version: infinite for one that must stay."""
        copies = len(self.holders[version])
        if copies <= self.versions[version].min_copies:
            return math.inf
        if copies > self.copies_wanted(version, self.limits.keep_slack):
            return 0.0
        return self.worth(version, copies)

    def victim(self, replica: str) -> tuple[float, str] | None:
        """The copy on a replica that is worth least, with its loss; None where all must stay."""
        least = min(
            ((self.loss(version), version) for version in self.placed[replica]), default=None
        )
        return least if least is not None and least[0] < math.inf else None

    # What a replica carries.

    def expected_tokens_per_s(self) -> dict[str, float]:
        """Tokens a second that each replica will get from a router that levels load over copies.

        Versions with the fewest copies are dealt first, since they have the least choice.
        """
        loads = dict.fromkeys(self.replicas, 0.0)
        order = sorted(
            (len(holders), -self.versions[version].tokens_per_s, version)
            for version, holders in self.holders.items()
            if holders
        )
        for copies, minus_tokens, version in order:
            if copies == 1:
                (holder,) = self.holders[version]
                loads[holder] -= minus_tokens
            else:
                _level(loads, self.holders[version], -minus_tokens)
        return loads

    def strain(self, version: str, replica: str, loads: Mapping[str, float]) -> float:
        """How little a replica suits one more copy of a version, by what it carries; 0 is best.

        The sum of its expected load with the copy, in fair parts; of the busy adapters beyond its GPU
        slots, as a share of these (each batch that changes them copies weights from host memory); and,
        lightly, of how full it is.
        """
        one = self.replicas[replica]
        demand = self.versions[version]
        tokens_per_s = loads[replica] + demand.tokens_per_s / (1 + len(self.holders[version]))
        carried = tokens_per_s / self.fair_tokens_per_s if self.fair_tokens_per_s else 0.0
        busy = sum(self._is_active(other) for other in self.placed[replica])
        crowding = max(0, busy + self._is_active(version) - one.gpu_slots) / one.gpu_slots
        fill = len(self.placed[replica]) / one.max_registered
        return carried + crowding + _FILL_WEIGHT * fill

    def _is_active(self, version: str) -> bool:
        return self.versions[version].requests_per_s > self.limits.active_requests_per_s


def rendezvous(version: str, replica: str) -> int:
    """Weight of a pair: the replica with the highest has a version by preference.

    Source: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM
    Transactions on Networking 6(1), 1998. It breaks ties, so that they fall the same way whoever
    computes them and however many replicas there are.
    """
    digest = hashlib.blake2b(f"{version}\0{replica}".encode(), digest_size=8).digest()
    return int.from_bytes(digest)


def _level(loads: dict[str, float], holders: set[str], tokens_per_s: float) -> None:
    """Adds a version's load to its holders, filling up the least loaded first."""
    order = sorted(holders, key=lambda name: (loads[name], name))
    total = tokens_per_s
    for count, name in enumerate(order, 1):
        total += loads[name]
        level = total / count
        if count == len(order) or level <= loads[order[count]]:
            for filled in order[:count]:
                loads[filled] = level
            return
