"""What a gateway costs: ours, the routers of SGLang and vLLM, and HAProxy over the same engines.

Every proxy runs alone on one core with one worker; two simulated engines and the load generator
share the other. Rounds alternate the proxies in rotated order, so that a drift of the machine meets
all alike; a figure is the median of the rounds. CPU is the kernel's account of the proxy's
processes, children and all threads included, between the two edges of a window.

* **CPU per request**: 32 connections, each sending its next whole request when it has its answer.
* **CPU per streamed event**: long streams that begin before the window and end after it, so the
  CPU of the window is the CPU of its events and nothing has to be subtracted. Each stream has an
  event every 20 ms, so no read ever finds two events of one stream. Two timings: in engine
  *steps*, when all streams of an engine have their events together, as a batching engine sends
  them; and *staggered*, each alone, where what is measured is mostly the kernel putting the proxy
  and its peer to sleep and waking them (worst on a virtual machine).
* **CPU per stream beside its events**: short streams, less the cost of their events.
* **Added latency**: arrivals at 200/s on a fixed random schedule, counted from the scheduled time
  to the end of the answer, minus the same without a proxy in the same round.
* **Requests/s**: of the first run. Where `core in use` is below 0.95 the load generator was the
  limit, not the proxy.

On a machine that is not quiet, start it under `nice -n -10` as root: all processes inherit that.
A window in which other programs (or a hypervisor) kept more than `--max-foreign` cores busy is
measured again, but for `--quick`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import machine, report
from benchmarks.load import LoadPlan, LoadResult
from benchmarks.peers import API_KEY, PEER_NAMES, Peer, PeerError, build_peer
from benchmarks.pinned import PinnedProcess, StartError, free_port, popen_on_core
from benchmarks.report import CONTROL, Phase, Round

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PROXY_CORE = 0
_LOAD_CORE = 1
_NUM_ENGINES = 2
_ENGINE_READY_S = 20.0
_LOAD_EXTRA_S = 90.0
_STREAM_TOKENS = 10
_NUM_STREAMS = 256
_MAX_EMPTY_RUNS = 3
_TABLE_WIDTH = 150

Target = tuple[str, int]


class BenchmarkError(Exception):
    """The run cannot go on."""


class Settings(msgspec.Struct, frozen=True):
    """How a run measures."""

    rounds: int
    window_s: float
    warmup_s: float
    interval_ms: float
    max_foreign_cores: float
    max_tries: int
    """Windows that are measured at most until one is quiet."""
    phases: tuple[Phase, ...]


class Results(msgspec.Struct):
    """What `--output` writes."""

    provenance: machine.Provenance
    settings: Settings
    versions: dict[str, str]
    summary: dict[str, dict[str, report.Spread]]
    goals: list[report.Goal]
    rounds: list[Round]


FULL = Settings(
    rounds=3,
    window_s=4.0,
    warmup_s=1.0,
    interval_ms=20.0,
    max_foreign_cores=0.15,
    max_tries=3,
    phases=("requests", "steps", "staggered", "streams", "latency"),
)
QUICK = msgspec.structs.replace(
    FULL,
    rounds=1,
    window_s=2.0,
    warmup_s=0.5,
    max_tries=1,
    phases=("requests", "steps", "staggered"),
)


def phase_plan(phase: Phase, settings: Settings) -> dict[str, Any]:
    """What the load generator is told for a phase, but for the target."""
    plan: dict[str, Any] = {"window_s": settings.window_s, "warmup_s": settings.warmup_s}
    if phase == "requests":
        return plan | {"mode": "closed", "connections": 32}
    if phase == "latency":
        # Twice the window: the 99th percentile needs the samples.
        return plan | {"mode": "open", "rate_per_s": 200.0, "window_s": 2 * settings.window_s}
    plan |= {"stream": True, "connections": _NUM_STREAMS}
    plan["interval_s"] = settings.interval_ms / 1000
    if phase == "streams":
        return plan | {"mode": "closed", "pacing": "steps", "num_tokens": _STREAM_TOKENS}
    return plan | {"mode": "steady", "pacing": phase}


class Bench:
    """Engines that run, and what is needed to measure one proxy after another over them."""

    def __init__(
        self, settings: Settings, folder: Path, engines: Sequence[PinnedProcess], console: Console
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._engine_pids = tuple(engine.pid for engine in engines)
        self._console = console

    def measure_peer(self, peer: Peer, engines: Sequence[Target], number: int) -> Round:
        """Starts a proxy, measures all phases, stops it."""
        process, port = peer.start(engines, _PROXY_CORE, self._folder)
        with process:
            targets = [("127.0.0.1", port)]
            phases = {
                phase: self._measure(peer.name, phase, targets, process.pid)
                for phase in self._settings.phases
            }
        return Round(peer.name, number, phases)

    def measure_control(self, engines: Sequence[Target], number: int) -> Round:
        """Measures latency without a proxy."""
        return Round(CONTROL, number, {"latency": self._measure(CONTROL, "latency", engines, None)})

    def _measure(
        self, name: str, phase: Phase, targets: Sequence[Target], pid: int | None
    ) -> LoadResult:
        plan = LoadPlan(
            targets=tuple(targets),
            api_key=API_KEY,
            account_pid=pid,
            support_pids=self._engine_pids,
            **phase_plan(phase, self._settings),
        )
        best: LoadResult | None = None
        for _ in range(self._settings.max_tries):
            result = self._run_until_counted(name, phase, plan)
            if best is None or result.foreign_cores < best.foreign_cores:
                best = result
            if best.foreign_cores <= self._settings.max_foreign_cores:
                break
            self._console.log(f"{name} {phase}: {result.foreign_cores:.2f} cores busy elsewhere")
        if best is None:
            raise BenchmarkError("nothing was measured")
        return best

    def _run_until_counted(self, name: str, phase: Phase, plan: LoadPlan) -> LoadResult:
        """A window in which a proxy stalled altogether says nothing about its cost."""
        for _ in range(_MAX_EMPTY_RUNS):
            result = self._run_load(name, phase, plan)
            if result.num_requests or result.num_events:
                return result
            self._console.log(f"[red]{name} {phase}: nothing came in the window; again")
        raise BenchmarkError(f"{name} {phase}: nothing came in {_MAX_EMPTY_RUNS} windows")

    def _run_load(self, name: str, phase: Phase, plan: LoadPlan) -> LoadResult:
        command = [sys.executable, "-m", "benchmarks.load", plan.model_dump_json()]
        process = popen_on_core(command, _LOAD_CORE, subprocess.PIPE, subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=plan.window_s + plan.warmup_s + _LOAD_EXTRA_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise BenchmarkError(f"{name} {phase}: the load generator did not end") from None
        if process.returncode:
            message = err.decode(errors="replace")[-2000:]
            raise BenchmarkError(f"{name} {phase}: the load generator failed:\n{message}")
        result = msgspec.json.decode(out, type=LoadResult)
        if result.failures:
            self._console.log(f"[red]{name} {phase}: wrong responses: {result.failures}")
        return result


@contextlib.contextmanager
def running_engines(
    settings: Settings, folder: Path
) -> Iterator[tuple[list[PinnedProcess], list[Target]]]:
    """Starts the simulated engines; leaving the context ends them."""
    with contextlib.ExitStack() as stack:
        processes: list[PinnedProcess] = []
        targets: list[Target] = []
        for index in range(_NUM_ENGINES):
            port = free_port()
            command = [sys.executable, "-m", "benchmarks.fast_engine", "--port", str(port)]
            command += ["--interval-ms", str(settings.interval_ms)]
            process = PinnedProcess(command, _LOAD_CORE, folder / f"engine-{index}.log")
            processes.append(stack.enter_context(process))
            process.wait_until_ready(port, "/health", _ENGINE_READY_S)
            targets.append(("127.0.0.1", port))
        yield processes, targets


def run_rounds(settings: Settings, peers: Sequence[Peer], console: Console) -> list[Round]:
    """Measures every proxy in every round, in an order that rotates."""
    rounds: list[Round] = []
    with (
        tempfile.TemporaryDirectory(prefix="headrace-bench-") as name,
        running_engines(settings, Path(name)) as (processes, engines),
    ):
        bench = Bench(settings, Path(name), processes, console)
        for number in range(settings.rounds):
            if "latency" in settings.phases:
                rounds.append(bench.measure_control(engines, number))
            first = number % len(peers)
            for peer in [*peers[first:], *peers[:first]]:
                console.log(f"round {number + 1} of {settings.rounds}: {peer.name}")
                rounds.append(bench.measure_peer(peer, engines, number))
    return rounds


def rich_table(rows: Sequence[Sequence[str]]) -> Table:
    """The same table for a terminal."""
    header, *body = rows
    table = Table(header[0])
    for title in header[1:]:
        table.add_column(title, justify="right")
    for row in body:
        table.add_row(*row)
    return table


def show(results: Results, as_markdown: bool) -> None:
    """Prints the tables to standard output."""
    costs = report.cost_rows(results.summary, results.versions, show_range=not as_markdown)
    tables = [costs]
    if results.goals:
        tables.append(report.goal_rows(results.goals))
    console = Console(width=_TABLE_WIDTH)
    for rows in tables:
        if as_markdown:
            typer.echo(report.markdown(rows) + "\n")
        else:
            console.print(rich_table(rows))


def compare(settings: Settings, peers: Sequence[Peer], console: Console) -> Results:
    """Makes the proxies ready, measures them and sums it up.

    Raises:
        PeerError: If a proxy cannot be made ready.
        StartError: If a process does not start.
        BenchmarkError: If a measurement cannot be made.
    """
    for peer in peers:
        peer.prepare()
    versions = {peer.name: peer.version() for peer in peers}
    measured = run_rounds(settings, peers, console)
    summary = report.summarise(measured, _STREAM_TOKENS)
    return Results(
        provenance=machine.provenance("benchmarks.gateway_cost"),
        settings=settings,
        versions=versions,
        summary={name: summary[name] for name in versions},
        goals=report.goals(summary),
        rounds=measured,
    )


def _settings(
    given: Settings, rounds: int | None, window_s: float | None, max_foreign_cores: float
) -> Settings:
    return msgspec.structs.replace(
        given,
        rounds=rounds or given.rounds,
        window_s=window_s or given.window_s,
        max_foreign_cores=max_foreign_cores,
    )


def measure(
    only: Annotated[str, typer.Option(help="Proxies to measure, by comma.")] = ",".join(PEER_NAMES),
    quick: Annotated[
        bool, typer.Option(help="One short round of the CPU figures, for tuning.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds.")] = None,
    window_s: Annotated[float | None, typer.Option(min=0.5, help="Length of a window.")] = None,
    max_foreign: Annotated[
        float, typer.Option(help="Cores that other programs may keep busy in a window.")
    ] = FULL.max_foreign_cores,
    output: Annotated[Path | None, typer.Option(help="Write all results as JSON.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print Markdown, as in the README.")] = False,
    headrace_python: Annotated[
        Path | None, typer.Option(help="Python that has headrace; else the one that runs this.")
    ] = None,
    router_logs: Annotated[
        bool, typer.Option("--router-logs", help="Let the routers log each request, their default.")
    ] = False,
    sglang_python: Annotated[
        Path | None, typer.Option(help="Python that has sglang-router; else one is made.")
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="Python that has vllm-router; else one is made.")
    ] = None,
    cache_dir: Annotated[
        Path, typer.Option(envvar="HEADRACE_CACHE_DIR", help="Where environments are kept.")
    ] = Path("~/.cache/headrace"),
) -> None:
    """Measures what each proxy costs and prints the table."""
    settings = _settings(QUICK if quick else FULL, rounds, window_s, max_foreign)
    given = {
        "headrace": headrace_python,
        "sglang-router": sglang_python,
        "vllm-router": vllm_python,
    }
    pythons = {name: path for name, path in given.items() if path is not None}
    console = Console(stderr=True)
    try:
        cache = cache_dir.expanduser() / "bench"
        names = [name.strip() for name in only.split(",")]
        peers = [build_peer(name, cache, pythons, router_logs=router_logs) for name in names]
        results = compare(settings, peers, console)
    except (PeerError, StartError, BenchmarkError) as error:
        console.print(f"[red]{error}", soft_wrap=True)
        raise typer.Exit(1) from error
    show(results, markdown)
    if output:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    if any(phase.failures for one in results.rounds for phase in one.phases.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(measure)
