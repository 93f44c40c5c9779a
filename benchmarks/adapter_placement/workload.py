"""Who asks for which adapter when: popularity that drifts, and one list of arrivals for all policies.

Owns the random numbers: the same popularity, seed and options give the same arrivals. Used by
`study.py`.
"""

from __future__ import annotations

import csv
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.adapter_placement import model

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence
    from pathlib import Path

DRIFT_S = 300.0
"""How long the popularity stays as it is."""
HOT = 32
"""The most popular versions, of which some change places with others when it drifts."""
NUM_SWAPS = 8
MAX_PROMPT_TOKENS = model.MAX_BATCHED_TOKENS
MAX_OUTPUT_TOKENS = 2048


class Arrival(NamedTuple):
    """One request."""

    at_s: float
    version: int
    prompt_tokens: int
    output_tokens: int


class Workload(NamedTuple):
    """What one fleet gets."""

    versions: Sequence[model.Version]
    arrivals: Sequence[Arrival]


class Client(NamedTuple):
    """One client of the ServeGen trace, standing in for the users of one adapter."""

    requests_per_active_window: float
    active_share: float


def zipf_weights(slope: float, rng: random.Random) -> Iterator[list[float]]:
    """Weights of each version, once per drift period: Zipf over a random order that drifts.

    In each period some of the hot versions change places with versions that are not.
    """
    order = list(range(model.NUM_VERSIONS))
    rng.shuffle(order)
    by_rank = [(rank + 1) ** -slope for rank in range(model.NUM_VERSIONS)]
    while True:
        weights = [0.0] * model.NUM_VERSIONS
        for rank, version in enumerate(order):
            weights[version] = by_rank[rank]
        yield weights
        hot = rng.sample(range(HOT), NUM_SWAPS)
        cold = rng.sample(range(HOT, model.NUM_VERSIONS), NUM_SWAPS)
        for here, there in zip(hot, cold, strict=True):
            order[here], order[there] = order[there], order[here]


def read_clients(path: Path) -> list[Client]:
    """Clients of `servegen_client_popularity.csv`, derived from ServeGen (Xiang et al. 2025).

    Each row has the requests of one client of Alibaba's model service and in how many of the
    ten-minute windows of its trace it sent any.
    """
    with path.open(newline="") as file:
        rows = [
            (int(row["total_requests"]), int(row["active_windows"]), int(row["windows"]))
            for row in csv.DictReader(file)
        ]
    return [
        Client(requests / active, active / windows)
        for requests, active, windows in rows
        if requests and active
    ]


def client_weights(clients: Sequence[Client], rng: random.Random) -> Iterator[list[float]]:
    """Weights of each version, once per drift period: each client is active by its share of windows.

    Versions beyond the number of clients repeat clients drawn at random.
    """
    drawn = [*clients, *rng.choices(clients, k=max(0, model.NUM_VERSIONS - len(clients)))]
    rng.shuffle(drawn)
    while True:
        yield [
            one.requests_per_active_window if rng.random() < one.active_share else 0.0
            for one in drawn[: model.NUM_VERSIONS]
        ]


def build(
    weights: Iterator[list[float]],
    rng: random.Random,
    requests_per_s: float,
    duration_s: float,
    load_scale: float,
) -> Workload:
    """Draws adapters and Poisson arrivals.

    Args:
        weights: One list per drift period.
        rng: Source of everything random.
        requests_per_s: Of the whole fleet.
        duration_s: Virtual time until the last arrival.
        load_scale: Factor on load times.
    """
    ranks = rng.choices(model.RANKS, model.RANK_WEIGHTS, k=model.NUM_VERSIONS)
    versions = [model.make_version(number, rank, load_scale) for number, rank in enumerate(ranks)]
    arrivals: list[Arrival] = []
    population = range(model.NUM_VERSIONS)
    for period, shares in enumerate(weights):
        at_s, end_s = period * DRIFT_S, min((period + 1) * DRIFT_S, duration_s)
        if at_s >= duration_s:
            break
        cumulative = list(itertools.accumulate(shares))
        while (at_s := at_s + rng.expovariate(requests_per_s)) < end_s:
            (version,) = rng.choices(population, cum_weights=cumulative)
            arrivals.append(Arrival(at_s, version, _prompt_tokens(rng), _output_tokens(rng)))
    return Workload(versions, arrivals)


def _prompt_tokens(rng: random.Random) -> int:
    drawn = rng.lognormvariate(math.log(model.PROMPT_MEDIAN_TOKENS), model.PROMPT_SIGMA)
    return min(MAX_PROMPT_TOKENS, max(1, round(drawn)))


def _output_tokens(rng: random.Random) -> int:
    drawn = rng.lognormvariate(math.log(model.OUTPUT_MEDIAN_TOKENS), model.OUTPUT_SIGMA)
    return min(MAX_OUTPUT_TOKENS, max(1, round(drawn)))
