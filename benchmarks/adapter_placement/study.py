"""All policies on all popularities over several seeds, and what that comes to.

Owns the choice of what is run and the figures of a run. Never prints: `benchmarks/adapters.py` does.
"""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING

import msgspec

from benchmarks.adapter_placement import model, workload
from benchmarks.adapter_placement.fleet import Fleet, Policy
from benchmarks.adapter_placement.headrace import Headrace
from benchmarks.adapter_placement.peers import (
    AllPods,
    BoundedHash,
    Dynamo,
    Hash,
    LeastAdapters,
)
from benchmarks.load import quantiles_ms
from benchmarks.report import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SERVEGEN = "servegen"
OURS = Headrace.name
_HOUR_S = 3600.0
_PERCENT = 100.0

POLICIES: dict[str, Callable[[Sequence[model.Version]], Policy]] = {
    Headrace.name: Headrace,
    Dynamo.name: Dynamo,
    BoundedHash.name: BoundedHash,
    Hash.name: Hash,
    LeastAdapters.name: lambda _versions: LeastAdapters(),
    AllPods.name: lambda _versions: AllPods(),
}

METRICS: dict[str, Metric] = {
    "miss_percent": Metric("misses (%)", 2),
    "load_wait_s": Metric("load wait (s/1,000 requests)", 1),
    "ttft_p50_ms": Metric("TTFT p50 (ms)", 0),
    "ttft_p99_ms": Metric("TTFT p99 (ms)", 0),
    "loads_per_hour": Metric("loads/h", 0),
    "ahead_per_hour": Metric("of them ahead", 0),
    "balance": Metric("busiest/mean", 2),
    "activations_per_hour": Metric("GPU slot fills/h", 0),
}
JUDGED = ("miss_percent", "load_wait_s", "ttft_p99_ms")
"""Where ours should be the least on every popularity."""


class Options(msgspec.Struct, frozen=True):
    """What a study is run with; recorded with its results."""

    popularities: tuple[str, ...]
    """`servegen`, or the slope of a Zipf distribution."""
    policies: tuple[str, ...]
    seeds: int
    requests_per_s: float
    """Of the whole fleet."""
    duration_s: float
    """Virtual time of arrivals."""
    warmup_s: float
    """Virtual time that is not measured."""
    load_scale: float
    """Factor on the time of a load."""


class Outcome(msgspec.Struct, frozen=True):
    """One policy on one popularity with one seed."""

    popularity: str
    policy: str
    seed: int
    num_requests: int
    figures: dict[str, float]


class Mean(msgspec.Struct, frozen=True):
    """Over the seeds."""

    mean: float
    least: float
    greatest: float


def run(
    options: Options,
    clients: Sequence[workload.Client],
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
) -> list[Outcome]:
    """Plays everything; the policies of one popularity and seed get the same arrivals.

    Args:
        options: What to run.
        clients: For `servegen`; may be empty where that is not asked for.
        on_outcome: Called after each run.
    """
    outcomes: list[Outcome] = []
    for popularity in options.popularities:
        for seed in range(options.seeds):
            # The same text gives the same stream on every machine and Python.
            rng = random.Random(f"{popularity}/{seed}")  # noqa: S311
            load = workload.build(
                _weights(popularity, clients, rng),
                rng,
                options.requests_per_s,
                options.duration_s,
                options.load_scale,
            )
            for policy in options.policies:
                fleet = Fleet(load, POLICIES[policy](load.versions), options.warmup_s)
                fleet.run()
                figures = measure(fleet, options.duration_s - options.warmup_s)
                outcome = Outcome(popularity, policy, seed, len(fleet.requests), figures)
                outcomes.append(outcome)
                on_outcome(outcome)
    return outcomes


def _weights(
    popularity: str, clients: Sequence[workload.Client], rng: random.Random
) -> Iterator[list[float]]:
    if popularity == SERVEGEN:
        return workload.client_weights(clients, rng)
    return workload.zipf_weights(float(popularity), rng)


def measure(fleet: Fleet, measured_s: float) -> dict[str, float]:
    """The figures of a fleet that has run; keys of `METRICS`.

    Args:
        fleet: After `run`.
        measured_s: Virtual time between the end of the warm-up and the last arrival.
    """
    requests = fleet.requests
    count = max(1, len(requests))
    hours = measured_s / _HOUR_S
    ttft_ms = quantiles_ms([one.ttft_s for one in requests])
    served = fleet.served_tokens()
    return {
        "miss_percent": _PERCENT * sum(one.missed for one in requests) / count,
        "load_wait_s": 1000 * sum(one.load_wait_s for one in requests) / count,
        "ttft_p50_ms": ttft_ms["p50"],
        "ttft_p99_ms": ttft_ms["p99"],
        "loads_per_hour": fleet.num_loads / hours,
        "ahead_per_hour": fleet.num_loads_ahead / hours,
        "balance": max(served) / statistics.fmean(served),
        "activations_per_hour": fleet.num_activations() / hours,
    }


def summarise(outcomes: Sequence[Outcome]) -> dict[str, dict[str, dict[str, Mean]]]:
    """Popularity → policy → figure, over the seeds."""
    samples: dict[str, dict[str, dict[str, list[float]]]] = {}
    for one in outcomes:
        figures = samples.setdefault(one.popularity, {}).setdefault(one.policy, {})
        for name, value in one.figures.items():
            figures.setdefault(name, []).append(value)
    return {
        popularity: {
            policy: {
                name: Mean(statistics.fmean(values), min(values), max(values))
                for name, values in figures.items()
            }
            for policy, figures in policies.items()
        }
        for popularity, policies in samples.items()
    }


def rows(policies: Mapping[str, Mapping[str, Mean]]) -> list[list[str]]:
    """Header and one row a policy, of one popularity: mean, and least to greatest of the seeds."""
    table = [["policy", *(metric.title for metric in METRICS.values())]]
    for policy, figures in policies.items():
        cells = [_cell(figures[name], metric.digits) for name, metric in METRICS.items()]
        table.append([policy, *cells])
    return table


def _cell(value: Mean, digits: int) -> str:
    text = f"{value.mean:,.{digits}f}"
    if value.least != value.greatest:
        text += f" ({value.least:,.{digits}f}\N{EN DASH}{value.greatest:,.{digits}f})"
    return text


def verdicts(summary: Mapping[str, Mapping[str, Mapping[str, Mean]]]) -> list[str]:
    """One sentence for each popularity and judged figure: ours against the best of the others."""
    found: list[str] = []
    for popularity, policies in summary.items():
        others = [policy for policy in policies if policy != OURS]
        if OURS not in policies or not others:
            continue
        for name in JUDGED:
            means = {policy: figures[name].mean for policy, figures in policies.items()}
            best = min(others, key=lambda policy: means[policy])
            metric = METRICS[name]
            verb = "better" if means[OURS] < means[best] else "not better"
            found.append(
                f"{popularity}, {metric.title}: {means[OURS]:,.{metric.digits}f} is {verb} than "
                f"{means[best]:,.{metric.digits}f} ({best})"
            )
    return found
