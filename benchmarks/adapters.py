"""What adapter placement is worth: ours and others' on simulated fleets over the same arrivals.

500 adapters on 8 replicas with 16 GPU slots and 32 registered adapters each, in virtual time. The
popularity is Zipf with several slopes, some hot adapters changing places with cold ones every five
minutes, and that of ServeGen's clients, each of which is active in its own share of the periods. Every
policy gets the same arrivals; where one leaves a choice of replica open, the replica with the fewest
outstanding tokens gets the request. `adapter_placement/model.py` names the constants and their sources,
`adapter_placement/peers.py` the policies and theirs.

* **misses**: requests that waited until their adapter was loaded.
* **load wait**: how long they waited for it, summed, for each 1,000 requests (missed or not).
* **TTFT**: from arrival to the first token, waiting included.
* **loads/h**: all loads, and those that no request had asked for.
* **busiest/mean**: tokens that the busiest replica served, against the mean of all.

Prefix caches and sessions are left out: they are the router's part. Run as `python -m benchmarks.adapters
--output FILE`; `--quick` takes a few seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from benchmarks import machine, report
from benchmarks.adapter_placement import study, workload

_CLIENTS = (
    Path(__file__).resolve().parent.parent.parent
    / "shared/data/traces/servegen_client_popularity.csv"
)
_POPULARITIES = (study.SERVEGEN, "0.6", "0.9", "1.2", "1.5")
_QUICK_POPULARITIES = ("1.2",)
_QUICK_DURATION_S = 240.0
_QUICK_WARMUP_S = 60.0
_WARMUP_S = 300.0


class Simulation(msgspec.Struct, frozen=True):
    """What came of the simulated fleets."""

    options: study.Options
    summary: dict[str, dict[str, dict[str, study.Mean]]]
    outcomes: list[study.Outcome]


class Results(msgspec.Struct, frozen=True):
    """What `--output` writes."""

    provenance: machine.Provenance
    simulation: Simulation


def _options(
    popularities: list[str],
    policies: list[str],
    seeds: int,
    requests_per_s: float,
    duration_s: float,
    load_scale: float,
    quick: bool,
) -> study.Options:
    if unknown := set(policies) - set(study.POLICIES):
        names = ", ".join(study.POLICIES)
        raise typer.BadParameter(f"There is no policy '{min(unknown)}': name some of {names}.")
    for one in popularities:
        if one != study.SERVEGEN and not _is_slope(one):
            raise typer.BadParameter(
                f"'{one}' is neither '{study.SERVEGEN}' nor a slope such as 0.9."
            )
    if not quick and duration_s <= _WARMUP_S:
        raise typer.BadParameter(f"The duration must be above the warm-up of {_WARMUP_S:g} s.")
    chosen = popularities or list(_QUICK_POPULARITIES if quick else _POPULARITIES)
    return study.Options(
        popularities=tuple(chosen),
        policies=tuple(policies or study.POLICIES),
        seeds=1 if quick else seeds,
        requests_per_s=requests_per_s,
        duration_s=_QUICK_DURATION_S if quick else duration_s,
        warmup_s=_QUICK_WARMUP_S if quick else _WARMUP_S,
        load_scale=load_scale,
    )


def _is_slope(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _read_clients(path: Path, popularities: tuple[str, ...]) -> list[workload.Client]:
    if study.SERVEGEN not in popularities:
        return []
    try:
        return workload.read_clients(path)
    except OSError as error:
        typer.echo(
            f"error: the clients of ServeGen cannot be read ({error.strerror}): give their file with "
            "--clients, or slopes with --popularity",
            err=True,
        )
        raise typer.Exit(1) from error


def simulate(
    popularity: Annotated[
        list[str], typer.Option(help="'servegen' or a Zipf slope; may be repeated. Default: all.")
    ] = [],  # noqa: B006 - Typer copies it
    only: Annotated[list[str], typer.Option(help="A policy; may be repeated. Default: all.")] = [],  # noqa: B006 - Typer copies it
    seeds: Annotated[int, typer.Option(min=1, help="Runs with other arrivals.")] = 3,
    requests_per_s: Annotated[float, typer.Option(min=0.1, help="Of the whole fleet.")] = 24.0,
    duration_s: Annotated[float, typer.Option(min=1.0, help="Virtual time.")] = 1200.0,
    load_scale: Annotated[float, typer.Option(min=0.0, help="Factor on load times.")] = 1.0,
    clients: Annotated[Path, typer.Option(help="ServeGen's clients, CSV.")] = _CLIENTS,
    quick: Annotated[bool, typer.Option(help="One slope, one seed, four virtual minutes.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write all results as JSON.")] = None,
) -> None:
    """Simulates fleets with many adapters under several placement policies."""
    options = _options(popularity, only, seeds, requests_per_s, duration_s, load_scale, quick=quick)
    outcomes = study.run(
        options,
        _read_clients(clients, options.popularities),
        lambda one: typer.echo(f"{one.popularity}, seed {one.seed}: {one.policy} done", err=True),
    )
    summary = study.summarise(outcomes)
    for name, policies in summary.items():
        title = name if name == study.SERVEGEN else f"Zipf {name}"
        typer.echo(f"\n{title}\n\n{report.markdown(study.rows(policies))}")
    typer.echo()
    for sentence in study.verdicts(summary):
        typer.echo(sentence)
    if output:
        results = Results(
            machine.provenance("benchmarks.adapters"), Simulation(options, summary, outcomes)
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


if __name__ == "__main__":
    typer.run(simulate)
