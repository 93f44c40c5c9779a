"""Fleets for the tests of placement: short constructors, and hypothesis strategies over them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from adapters.placement import Limits, ReplicaCapacity, VersionDemand

UNBOUND = Limits(max_loads_per_replica=10_000, max_loads_fraction=1_000.0)
"""Everything in one plan."""


def version(name, requests_per_s=1.0, tokens_per_s=None, **fields):
    """A version of `base` that takes a second to load."""
    tokens_per_s = 500.0 * requests_per_s if tokens_per_s is None else tokens_per_s
    defaults = {"base": "base", "rank": 16, "size_bytes": 1, "load_s": 1.0}
    defaults |= {"min_copies": 0, "idle_s": 0.0}
    return VersionDemand(
        version=name,
        requests_per_s=requests_per_s,
        tokens_per_s=tokens_per_s,
        **(defaults | fields),
    )


def replica(name, max_registered=4, resident=(), **fields):
    """A healthy replica of `base`."""
    defaults = {"base": "base", "gpu_slots": 2, "unloadable": frozenset()}
    defaults |= {"draining": frozenset(), "is_healthy": True, "load_tokens": 0.0}
    fields = defaults | fields
    return ReplicaCapacity(
        name=name, max_registered=max_registered, resident=frozenset(resident), **fields
    )


def apply(plan, replicas):
    """The fleet after a plan has been followed: what left is gone, what was loaded is resident."""
    after = []
    for one in replicas:
        resident = set(one.resident)
        resident -= {move.version for move in plan.unloads if move.replica == one.name}
        resident |= {move.version for move in plan.loads if move.replica == one.name}
        after.append(replace(one, resident=frozenset(resident)))
    return after


_BASES = st.sampled_from(["base", "base", "base", "other"])
_RATES = st.one_of(st.just(0.0), st.floats(0.001, 20.0))


@st.composite
def fleets(draw):
    """Versions and replicas, some of them in odd states."""
    names = [f"v{number:02d}" for number in range(draw(st.integers(0, 14)))]
    versions = [
        version(
            name,
            draw(_RATES),
            draw(_RATES) * 300,
            base=draw(_BASES),
            load_s=draw(st.floats(0.05, 5.0)),
            min_copies=draw(st.sampled_from([0, 0, 0, 1, 2])),
            idle_s=draw(st.sampled_from([0.0, 30.0, 1e5])),
        )
        for name in names
    ]
    some = st.frozensets(st.sampled_from([*names, "unknown"]), max_size=6)
    replicas = []
    for number in range(draw(st.integers(0, 5))):
        max_registered = draw(st.integers(0, 6))
        resident = frozenset(sorted(draw(some))[:max_registered])
        draining = frozenset(sorted(draw(some) & resident)[: draw(st.integers(0, 2))])
        replicas.append(
            replica(
                f"r{number}",
                max_registered,
                resident,
                base=draw(_BASES),
                gpu_slots=draw(st.integers(0, 3)),
                unloadable=frozenset(sorted(draw(some))[:2]),
                draining=draining,
                is_healthy=draw(st.sampled_from([True, True, True, False])),
                load_tokens=draw(st.floats(0, 1e4)),
            )
        )
    return versions, replicas
