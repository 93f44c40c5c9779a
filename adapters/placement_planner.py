"""The steps of a plan, on a board: drop, require, cover, balance.

Owns their order and their bounds; `placement.py`, its only caller, says what they are for. No I/O.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from adapters.placement_board import Board, rendezvous
from adapters.placement_view import Move

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapters.placement_view import Limits, ReplicaCapacity, VersionDemand

_WORTHWHILE = 0.9
"""Two replicas exchange versions only if the busier of the two then exceeds the other's old load by
less than this share of what it did."""


class Planner:
    """Makes the plan of one base model: `run`, once.

    Attributes:
        board: What is to be where.
        loads: Moves, most urgent first.
        unloads: Moves, those that make room first.
    """

    def __init__(
        self,
        versions: Sequence[VersionDemand],
        replicas: Sequence[ReplicaCapacity],
        limits: Limits,
    ) -> None:
        """Starts from what is resident.

        Args:
            versions: Of one base model.
            replicas: Of that base model.
            limits: The caller's.
        """
        self.board = Board(versions, replicas, limits)
        self.loads: list[Move] = []
        self.unloads: list[Move] = []
        self._limits = limits
        places = sum(one.max_registered for one in self.board.replicas.values())
        self._loads_left = max(1, int(places * limits.max_loads_fraction))
        self._replica_loads_left = dict.fromkeys(self.board.replicas, limits.max_loads_per_replica)

    def run(self) -> None:
        """Moves until nothing is worth moving or the limits are reached."""
        self._drop()
        self._require()
        while self._cover() or self._balance():
            pass
        self._name_unwanted()

    # 1. What cannot stay.

    def _drop(self) -> None:
        board = self.board
        for name, one in sorted(board.versions.items()):
            if one.idle_s < self._limits.idle_unload_s:
                continue
            holders = sorted(board.holders[name], key=lambda holder: rendezvous(name, holder))
            for holder in holders[: max(0, len(holders) - one.min_copies)]:
                self._unload(name, holder)
        for replica in board.replicas:
            while board.room(replica) < 0:
                # Above capacity nothing can stay, pinned or not.
                worst = min(
                    board.placed[replica], key=lambda version: (board.loss(version), version)
                )
                self._unload(worst, replica)

    def _name_unwanted(self) -> None:
        """Unloads of residents that were never on the board, first: they cost nobody anything."""
        unwanted = [
            Move(version, name)
            for name, one in self.board.replicas.items()
            for version in sorted(one.resident)
            if version not in self.board.versions or version in one.unloadable
        ]
        self.unloads[:0] = unwanted

    # 2. Copies that must be.

    def _require(self) -> None:
        board = self.board
        missing = sorted(
            (len(board.holders[name]) > 0, -one.requests_per_s, name)
            for name, one in board.versions.items()
            if len(board.holders[name]) < one.min_copies
        )
        for _, _, name in missing:
            while len(board.holders[name]) < board.versions[name].min_copies:
                if not (self._place(name, math.inf) or self._make_way(name)):
                    break

    def _make_way(self, version: str) -> bool:
        """Places a required copy where all must stay, by moving one of those; whether it could.

        Looks one move far: chains of moves could place more, where replicas differ in what they can load.
        """
        board = self.board
        ways = (
            (rendezvous(version, replica), replica, mover, target)
            for replica in self._open(version)
            for mover in board.placed[replica]
            for target in self._open(mover)
            if board.room(target) > 0 or board.victim(target) is not None
        )
        found = max(ways, default=None)
        if found is None:
            return False
        _, replica, mover, target = found
        victim = board.victim(target)
        if board.room(target) <= 0 and victim is not None:
            self._unload(victim[1], target)
        self._load(mover, target)
        self._unload(mover, replica)
        self._load(version, replica)
        return True

    # 3. Copies that are worth it.

    def _cover(self) -> bool:
        """Places the most valuable missing copies; whether any was placed."""
        board = self.board
        has_placed = False
        wanted = [(-gain, name) for name in board.versions if (gain := board.gain(name)) > 0]
        heapq.heapify(wanted)
        floor = self._floor()
        while wanted and self._loads_left > 0 and -wanted[0][0] > floor:
            minus_gain, name = heapq.heappop(wanted)
            if not self._place(name, -minus_gain):
                continue
            has_placed = True
            floor = self._floor()
            if (gain := board.gain(name)) > 0:
                heapq.heappush(wanted, (-gain, name))
        return has_placed

    def _floor(self) -> float:
        """What a copy must be worth more than, to come anywhere; below zero where there is room."""
        board = self.board
        floors = [
            -1.0 if board.room(name) > 0 else self._threshold(name)
            for name in board.replicas
            if self._replica_loads_left[name] > 0
        ]
        return min(floors, default=math.inf)

    def _threshold(self, replica: str) -> float:
        victim = self.board.victim(replica)
        return math.inf if victim is None else victim[0] * (1 + self._limits.displace_margin)

    def _place(self, version: str, gain: float) -> bool:
        """Puts one copy where it strains least and displaces least; whether there was a place."""
        board = self.board
        expected = board.expected_tokens_per_s()
        choices: list[tuple[float, int, str, str | None]] = []
        for replica in self._open(version):
            victim = None if board.room(replica) > 0 else board.victim(replica)
            if victim is None and board.room(replica) <= 0:
                continue
            lost = victim[0] if victim else 0.0
            if victim and lost * (1 + self._limits.displace_margin) >= gain:
                continue
            strain = board.strain(version, replica, expected) + lost / self._scale(gain)
            choices.append(
                (
                    round(strain, 9),
                    -rendezvous(version, replica),
                    replica,
                    victim[1] if victim else None,
                )
            )
        if not choices:
            return False
        _, _, replica, evicted = min(choices)
        if evicted is not None:
            self._unload(evicted, replica)
        self._load(version, replica)
        return True

    def _open(self, version: str) -> Iterator[str]:
        """Replicas that may be asked to load a version now."""
        for replica, left in self._replica_loads_left.items():
            if left > 0 and self.board.can_load(version, replica):
                yield replica

    def _scale(self, gain: float) -> float:
        """What a loss is measured by."""
        if gain < math.inf:
            return gain
        return max((self.board.worth(name, 1) for name in self.board.versions), default=0.0) or 1.0

    # 4. Even loads.

    def _balance(self) -> bool:
        """Lets the busiest replica and the idlest exchange versions; whether they did."""
        board = self.board
        loads = board.expected_tokens_per_s()
        if len(loads) < 2 or self._loads_left <= 0:
            return False
        busiest = max(loads, key=lambda name: (loads[name], name))
        idlest = min(loads, key=lambda name: (loads[name], name))
        mean = sum(loads.values()) / len(loads)
        excess = max(self._limits.imbalance * mean, self._limits.copy_tokens_per_s)
        if loads[busiest] - mean <= excess or self._replica_loads_left[idlest] <= 0:
            return False
        gap = loads[busiest] - loads[idlest]
        for version in self._movable(busiest, idlest, gap):
            if self._exchange(version, busiest, idlest, gap):
                return True
        return False

    def _movable(self, source: str, target: str, gap: float) -> list[str]:
        """Lone copies that would even out two replicas, the best first."""
        board = self.board
        found = [
            (abs(board.versions[name].tokens_per_s - gap / 2), name)
            for name in board.placed[source]
            if len(board.holders[name]) == 1 and board.can_load(name, target)
        ]
        return [name for _, name in sorted(found)]

    def _exchange(self, version: str, source: str, target: str, gap: float) -> bool:
        """Moves a version, against the target's quietest lone copy where that is full."""
        board = self.board
        quiet: str | None = None
        moved = board.versions[version].tokens_per_s
        if board.room(target) <= 0:
            lone = [
                (board.versions[name].tokens_per_s, name)
                for name in board.placed[target]
                if len(board.holders[name]) == 1 and board.can_load(name, source)
            ]
            if not lone or self._replica_loads_left[source] <= 0 or self._loads_left < 2:
                return False
            back, quiet = min(lone)
            moved -= back
        # The busier one carries the gap above the other before, and the greater of both parts after.
        if max(moved, gap - moved) >= _WORTHWHILE * gap:
            return False
        if quiet is not None:
            self._unload(quiet, target)
        self._load(version, target)
        self._unload(version, source)
        if quiet is not None:
            self._load(quiet, source)
        return True

    # Bookkeeping.

    def _load(self, version: str, replica: str) -> None:
        self.board.add(version, replica)
        move = Move(version, replica)
        if move in self.unloads:
            self.unloads.remove(move)
            return
        self.loads.append(move)
        self._loads_left -= 1
        self._replica_loads_left[replica] -= 1

    def _unload(self, version: str, replica: str) -> None:
        self.board.remove(version, replica)
        move = Move(version, replica)
        if move in self.loads:
            self.loads.remove(move)
            self._loads_left += 1
            self._replica_loads_left[replica] += 1
            return
        self.unloads.append(move)
