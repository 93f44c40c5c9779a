"""What placement sees and says: demand per version, capacity per replica, limits, moves.

Owns the value types of `placement.py`, which alone computes with them. Never does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class VersionDemand:
    """One adapter version that may be placed.

    Attributes:
        version: `name@digest12`.
        base: Base model that it is for.
        requests_per_s: Decayed request rate (`demand.py`).
        tokens_per_s: Decayed rate of prompt and completion tokens.
        rank: LoRA rank.
        size_bytes: Bytes of its weights: what each batch that has it reads besides the base model.
        load_s: Measured seconds from asking an engine to load it until it is ready.
        min_copies: Replicas that must have it: pinned, on trial, or a flip in progress; 0 for none.
        idle_s: Seconds since its last request.
    """

    version: str
    base: str
    requests_per_s: float
    tokens_per_s: float
    rank: int
    size_bytes: int
    load_s: float
    min_copies: int
    idle_s: float


@dataclass(frozen=True, slots=True)
class ReplicaCapacity:
    """One replica.

    Attributes:
        name: Unique in the fleet.
        base: Base model that it serves.
        gpu_slots: Adapters that one batch can have (vLLM's `max_loras`; for SGLang one less than
            `max_loras_per_batch`, which counts the base). 0 where it takes no adapters.
        max_registered: Adapters it may know at once, draining ones included (`max_cpu_loras`,
            `max_loaded_loras`). Never exceeded.
        resident: Versions that it knows or is being told to load.
        unloadable: Versions that it cannot load (the linter's verdict).
        draining: Versions that take no new requests and leave when the last one ends. They hold
            their place and are never moved or loaded here meanwhile.
        is_healthy: Whether anything may be placed here.
        load_tokens: Tokens outstanding now.
    """

    name: str
    base: str
    gpu_slots: int
    max_registered: int
    resident: frozenset[str]
    unloadable: frozenset[str]
    draining: frozenset[str]
    is_healthy: bool
    load_tokens: float


@dataclass(frozen=True, slots=True)
class Limits:
    """How eagerly placement moves things.

    Attributes:
        max_loads_per_replica: Loads that one plan asks of one replica.
        max_loads_fraction: Loads that one plan asks of the fleet, as a share of its places; at least
            one. Versions below their `min_copies` come first and count, but only against the bound
            of each replica.
        displace_margin: A version takes another's place only if it is worth more by this share.
        keep_slack: A copy that the load no longer asks for stays until the load would not ask for it
            if it were greater by this share.
        max_share: Share of a replica's fair part of all tokens that one copy should carry; beyond it
            another copy is wanted.
        copy_tokens_per_s: Below this load a copy is never too busy, however little else goes on.
        imbalance: A replica whose expected load is above the mean by more than this share gives a
            version to another.
        near_worth: Copies whose worth differs by less than this share are taken for equal by a cold
            placement: estimated rates are no better than that.
        active_requests_per_s: A version asked for more often than this takes a GPU slot most of the time.
        idle_unload_s: A version without a request for so long is unloaded, unless it must stay.
        settle_s: A version used within this many seconds is a cold placement's victim only where
            nothing else is: its requests may still run.
    """

    max_loads_per_replica: int = 2
    max_loads_fraction: float = 0.04
    displace_margin: float = 3.0
    keep_slack: float = 0.5
    max_share: float = 0.25
    copy_tokens_per_s: float = 100.0
    imbalance: float = 0.15
    near_worth: float = 0.5
    active_requests_per_s: float = 0.1
    idle_unload_s: float = 3600.0
    settle_s: float = 10.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Move:
    """One version to load on, or to unload from, one replica."""

    version: str
    replica: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What should be where, and the steps from what is.

    Attributes:
        desired: Replica → versions it should have after these moves. Every replica of the fleet is
            named; one that is not healthy has none.
        loads: Most urgent first. A load into a full replica waits for that replica's unloads.
        unloads: In this order. A version that is in both changes places: its unload waits for its load,
            but for one that makes room there.
    """

    desired: Mapping[str, frozenset[str]]
    loads: tuple[Move, ...]
    unloads: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class ColdPlacement:
    """Where a version's first request should wait for it.

    Attributes:
        replica: Where to load it.
        evict: Version to unload there first; None where there is room, or where it is resident.
    """

    replica: str
    evict: str | None
