"""Which adapter versions are on which replicas: a pure function from demand and capacity to moves.

Owns the objective and the two entry points; `placement_view.py` has the types, `placement_board.py` the
formulas, `placement_planner.py` the steps. Never does
I/O, never reads a clock, never keeps state: the same arguments give the same plan. Called by whoever
reconciles replicas (`plan`, every few seconds) and by whoever has a request for a version that is
nowhere (`place_cold`).

**Objective.** Load seconds kept off the request path: the sum over versions v with k_v copies of
`requests_per_s · load_s · (1 + 1/2 + … + 1/k_v)`, counting no more copies than the load of v asks for
(`Board.copies_wanted`), under the replicas' capacities; second to it, the sum of squared loads of the
replicas. Marginal values fall with each copy, so taking the best exchange first is optimal for the
first, and every exchange raises the first or keeps it and lowers the second: plans come to rest.

1. Copies that cannot stay go: unwanted, unloadable, above capacity, or idle for long.
2. Versions below `min_copies` get theirs, from the least valuable copies if need be.
3. The most valuable missing copies come, each where it strains a replica least. A resident gives way only
   to what is worth more by `displace_margin`: evicting the least value per slot is GreedyDual-Size with
   frequency (Cherkasova 1998) for slots of one size, the frequency being decayed instead of aged.
4. While a replica carries more than its fair part by `imbalance`, one of its versions changes places
   with a quiet one of the least loaded.

What public systems do, and what of it is here: S-LoRA (Sheng et al., MLSys 2024) keeps all adapters
in host memory, which `max_registered` stands for; Chameleon (Iliakopoulou et al., MICRO 2025) evicts by
frequency, recency and size together: frequency (decayed, hence recency) times load seconds (hence size)
here; dLoRA (Wu et al., OSDI 2024) migrates adapters between replicas to even their loads: step 4;
CaraServe (Li et al. 2024) and LoRAServe (Jaiswal et al. 2025) weigh
what adapters cost a batch: `copies_wanted` and `strain`. Ranks are not kept apart as LoRAServe does:
vLLM pads every adapter to its highest allowed rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adapters.placement_board import Board, rendezvous
from adapters.placement_planner import Planner
from adapters.placement_view import (
    DEFAULT_LIMITS,
    ColdPlacement,
    Limits,
    Move,
    Plan,
    ReplicaCapacity,
    VersionDemand,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ColdPlacement",
    "Limits",
    "Move",
    "Plan",
    "ReplicaCapacity",
    "VersionDemand",
    "place_cold",
    "plan",
]


def plan(
    versions: Sequence[VersionDemand],
    replicas: Sequence[ReplicaCapacity],
    limits: Limits = DEFAULT_LIMITS,
) -> Plan:
    """Decide where versions should be and the next moves there.

    Loads are bounded, so it can take several plans until all is in place; a plan that follows the
    last one with the same demand is empty. `desired` is what these moves lead to.

    Args:
        versions: All that may be placed; a resident that is not among them is unloaded.
        replicas: The fleet, unhealthy replicas included: nothing is placed on them, nothing is asked
            of them, and their copies do not count.
        limits: How eagerly to move.

    Raises:
        ValueError: If two versions or two replicas have one name.
    """
    _check_unique([one.version for one in versions], "version")
    _check_unique([one.name for one in replicas], "replica")
    desired: dict[str, frozenset[str]] = {one.name: frozenset() for one in replicas}
    loads: list[Move] = []
    unloads: list[Move] = []
    for base in sorted({one.base for one in replicas}):
        planner = Planner(
            [one for one in versions if one.base == base],
            [one for one in replicas if one.base == base],
            limits,
        )
        planner.run()
        desired.update({name: frozenset(has) for name, has in planner.board.placed.items()})
        loads += planner.loads
        unloads += planner.unloads
    return Plan(desired, tuple(loads), tuple(unloads))


def place_cold(
    version: VersionDemand,
    versions: Sequence[VersionDemand],
    replicas: Sequence[ReplicaCapacity],
    limits: Limits = DEFAULT_LIMITS,
) -> ColdPlacement | None:
    """Choose where the first request for a version that is nowhere should wait for it.

    Among the replicas that carry no more than `imbalance` above the mean of outstanding tokens: one with
    room, else one whose least valuable copy is worth least, else one where only copies used within
    `settle_s` can go; copies that must stay never go. Of replicas whose offers are worth about the
    same (`near_worth`), the one with the fewest outstanding tokens.

    Args:
        version: What is asked for; it need not be among `versions`.
        versions: All that may be placed; residents that are not among them are the first to go.
        replicas: The fleet.
        limits: `imbalance`, `near_worth`, `settle_s` and `keep_slack` count.

    Returns:
        None where there is no room that may be taken.
    """
    known = [one for one in versions if one.base == version.base and one.version != version.version]
    board = Board([*known, version], [one for one in replicas if one.base == version.base], limits)
    if holders := board.holders[version.version]:
        nearest = min(holders, key=lambda name: (board.replicas[name].load_tokens, name))
        return ColdPlacement(nearest, None)
    offers = {
        name: offer
        for name in board.replicas
        if board.can_load(version.version, name) and (offer := _cold_offer(board, name)) is not None
    }
    if not offers:
        return None
    tokens = {name: board.replicas[name].load_tokens for name in offers}
    mean = sum(tokens.values()) / len(tokens)
    # Rounding may put the mean below the least.
    bound = max((1 + limits.imbalance) * mean, min(tokens.values()))
    free = [name for name in offers if tokens[name] <= bound]
    kind, least = min(offers[name][:2] for name in free)
    near = [
        name
        for name in free
        if offers[name][0] == kind and offers[name][1] <= least * (1 + limits.near_worth)
    ]
    chosen = min(near, key=lambda name: (tokens[name], -rendezvous(version.version, name)))
    return ColdPlacement(chosen, offers[chosen][2])


def _cold_offer(board: Board, replica: str) -> tuple[int, float, str | None] | None:
    """What a replica gives up to take one more: 0 room, 1 a copy, 2 one just used; its worth; it."""
    one = board.replicas[replica]
    room = one.max_registered - len(one.resident) - len(one.draining)
    if room > 0:
        return (0, 0.0, None)
    if room < 0:
        # Above capacity: one that goes leaves no place for another.
        return None
    unwanted = one.resident - board.placed[replica]
    if unwanted:
        return (1, 0.0, min(unwanted))
    return min(
        (
            (1 + (board.versions[name].idle_s < board.limits.settle_s), loss, name)
            for name in board.placed[replica]
            if (loss := board.loss(name)) < math.inf
        ),
        default=None,
    )


def _check_unique(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"The {what} '{twice}' is given twice: give each once.")
