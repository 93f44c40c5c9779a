"""Ten thousand open streams on one worker, and what they do to each other.

Two simulated engines send each stream one event a second. Beside the many streams there is always
one probe stream with an event every 20 ms from an engine of its own, whose inter-token latency is
what a user would see. Every response is checked. One core has the gateway, the other the rest.

1. **Crowd**: the probe alone, then beside all streams: the gateway's peak memory, its CPU, streams
   that broke off, the probe's inter-token latency.
2. **Slow clients**: the same probe beside clients that ask for long, fast streams and never read.
3. **Leaving**: 1,000 clients reset at once; how long until the engines run 1,000 requests less.

A stream takes two descriptors of the gateway, one each of the load generator and an engine. Where a
process may have 20,000 (the limit in the results), 10,000 streams do not fit beside the rest: 9,900
do, which is what the default asks for. Run as `python -m benchmarks.many_streams --output FILE`.
"""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
import uvloop

from benchmarks import machine
from benchmarks.peers import Headrace
from benchmarks.pinned import StartError
from benchmarks.stream_crowd import Crowd, CrowdResult, Leaving
from benchmarks.stream_fleet import LOAD_CORE, Fleet, StreamError, running_fleet
from benchmarks.stream_probe import Itl, probe
from benchmarks.stream_slow import open_slow

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPARE_DESCRIPTORS = 150


class Results(msgspec.Struct, frozen=True):
    """What `--output` writes."""

    provenance: machine.Provenance
    gateway: str
    descriptors: int
    """Limit of a process; a stream takes two of the gateway's."""
    probe_alone: Itl
    probe_in_crowd: Itl
    probe_beside_slow: Itl
    slow_clients: int
    crowd: CrowdResult
    leaving: Leaving


async def run(fleet: Fleet, num_streams: int, num_slow: int, window_s: float) -> Results:
    """Measures everything, once."""
    alone = await probe(fleet, window_s)
    slow = await open_slow(fleet, num_slow)
    beside_slow = await probe(fleet, window_s)
    for client in slow:
        client.abort()
    crowd = Crowd(fleet, num_streams)
    rss_before_mib = crowd.rss_mib()
    open_s = await crowd.open(window_s)
    typer.echo(f"{num_streams} streams are open after {open_s:.1f} s", err=True)
    in_crowd = await probe(fleet, window_s)
    peak_mib = crowd.peak_rss_mib()
    leaving = await crowd.leave()
    typer.echo(f"{leaving.clients} clients left; the others go on to their end", err=True)
    await crowd.finish()
    return Results(
        provenance=machine.provenance("benchmarks.many_streams"),
        gateway=Headrace(None).version(),
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        probe_alone=alone,
        probe_in_crowd=in_crowd,
        probe_beside_slow=beside_slow,
        slow_clients=num_slow,
        crowd=crowd.result(open_s, rss_before_mib, peak_mib),
        leaving=leaving,
    )


def _check_descriptors(num_streams: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * num_streams + _SPARE_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise StreamError(
            f"{num_streams} streams need {needed} descriptors of the gateway, and a process may "
            f"have {hard}: raise the limit (ulimit -Hn) or ask for fewer with --streams"
        )
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def rows(results: Results) -> Sequence[tuple[str, str]]:
    """What is printed: a name and a value a line."""
    crowd, leaving = results.crowd, results.leaving
    probes = (
        ("alone", results.probe_alone),
        (f"beside {results.slow_clients} clients that do not read", results.probe_beside_slow),
        (f"beside {crowd.streams} streams", results.probe_in_crowd),
    )
    return [
        ("streams", f"{crowd.streams}, open after {crowd.open_s:.1f} s"),
        ("completed, broken", f"{crowd.completed}, {crowd.failures or 0}"),
        ("memory (MiB)", f"{crowd.rss_before_mib:.0f} before, {crowd.rss_peak_mib:.0f} at most"),
        ("memory a stream (KiB)", f"{crowd.kib_per_stream:.1f}"),
        *(
            (
                f"probe {name}",
                f"ITL p50 {probe.itl_ms['p50']:.1f} ms, p99 {probe.itl_ms['p99']:.1f} ms, "
                f"{probe.cpu_cores:.2f} cores",
            )
            for name, probe in probes
        ),
        (f"{leaving.clients} leave", f"engines free of them after {leaving.freed_s:.2f} s"),
    ]


def measure(
    streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 9_900,
    slow_clients: Annotated[int, typer.Option(min=1, help="Clients that do not read.")] = 100,
    window_s: Annotated[float, typer.Option(min=2.0, help="Length of a probe stream.")] = 15.0,
    output: Annotated[Path | None, typer.Option(help="Write all results as JSON.")] = None,
) -> None:
    """Opens many streams on one worker and measures what that does."""
    try:
        _check_descriptors(streams)
        with (
            tempfile.TemporaryDirectory(prefix="headrace-streams-") as name,
            running_fleet(Path(name)) as fleet,
        ):
            os.sched_setaffinity(0, {LOAD_CORE})
            results = uvloop.run(run(fleet, streams, slow_clients, window_s))
    except (StreamError, StartError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for title, value in rows(results):
        typer.echo(f"{title}: {value}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    if results.crowd.failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(measure)
