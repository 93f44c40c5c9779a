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

import asyncio
import contextlib
import http.client
import itertools
import os
import resource
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import psutil
import typer
import uvloop

from benchmarks import accounts, machine
from benchmarks.exchange import ClientConnection, Outcome, Request
from benchmarks.load import LoadPlan, build_request, quantiles_ms
from benchmarks.peers import API_KEY, Headrace
from benchmarks.pinned import PinnedProcess, StartError, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_GATEWAY_CORE = 0
_LOAD_CORE = 1
_CROWD_MODEL = "crowd-model"
_PROBE_MODEL = "probe-model"
_CROWD_INTERVAL_S = 1.0
_PROBE_INTERVAL_S = 0.02
_NUM_CROWD_ENGINES = 2
_READY_S = 60.0
_PHASE_S = 180.0
_POLL_S = 0.01
_CONNECTS_AT_ONCE = 100
_MAX_LEAVING = 1000
_SLOW_TOKENS = 1_000_000
_SLOW_RECEIVE_BYTES = 4096
_PROBE_SETTLE_S = 1.0
_SPARE_DESCRIPTORS = 150
_MEBIBYTE = 1024 * 1024
_OPENS_PER_S = 400
"""At least: decides how long the streams have to be."""
_SLACK_S = 15.0


class Itl(msgspec.Struct, frozen=True):
    """Inter-token latency of the probe stream, and the gateway's CPU meanwhile."""

    num_events: int
    itl_ms: dict[str, float]
    cpu_cores: float
    """Cores that the gateway kept busy."""


class Crowd(msgspec.Struct, frozen=True):
    """The many streams."""

    streams: int
    open_s: float
    """From the first connect until every stream had its first event."""
    rss_before_mib: float
    rss_peak_mib: float
    kib_per_stream: float
    events: int
    """Events of all streams, until they ended or left."""
    completed: int
    failures: dict[str, int]


class Leaving(msgspec.Struct, frozen=True):
    """Clients that leave at once."""

    clients: int
    running_before: int
    freed_s: float
    """From the first reset until the engines ran so many requests less."""


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
    crowd: Crowd
    leaving: Leaving


class StreamError(Exception):
    """The run cannot go on; the message says why."""


class Fleet(msgspec.Struct, frozen=True):
    """The processes of a run."""

    gateway_port: int
    gateway_pid: int
    crowd_ports: tuple[int, ...]


class ProbeConnection(ClientConnection):
    """The stream whose events are timed."""

    def __init__(self, on_end: Callable[[ClientConnection, Outcome], None]) -> None:
        super().__init__(on_end)
        self.arrivals_s: list[float] = []

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        before = self.num_events
        super().on_body(body)
        now = time.monotonic()
        self.arrivals_s.extend([now] * (self.num_events - before))


class SlowConnection(asyncio.Protocol):
    """Asks, and never reads."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self.transport = transport  # type: ignore[assignment]
        if self.transport is not None:
            self.transport.pause_reading()
            self.transport.write(self._request)

    def abort(self) -> None:
        """Leaves."""
        if self.transport is not None:
            self.transport.abort()


def _request(model: str, num_tokens: int) -> Request:
    plan = LoadPlan(
        mode="closed",
        targets=(("127.0.0.1", 1),),
        model=model,
        api_key=API_KEY,
        stream=True,
        num_tokens=num_tokens,
    )
    return build_request(plan, num_tokens)


class Measurement:
    """One run over a fleet: the crowd, the probe, the slow and the leaving."""

    def __init__(self, fleet: Fleet, num_streams: int, window_s: float) -> None:
        self._fleet = fleet
        self._num_streams = num_streams
        self._window_s = window_s
        self._gateway = psutil.Process(fleet.gateway_pid)
        self._crowd: list[ClientConnection] = []
        self._ended: Counter[str] = Counter()
        self._num_completed = 0
        self._has_left = False

    async def probe(self) -> Itl:
        """Times one stream of 50 events a second over a window."""
        loop = asyncio.get_running_loop()
        failures: list[str | None] = []
        num_tokens = round((self._window_s + _PROBE_SETTLE_S) / _PROBE_INTERVAL_S)
        request = _request(_PROBE_MODEL, num_tokens)
        done = asyncio.Event()

        def on_end(_: ClientConnection, outcome: Outcome) -> None:
            failures.append(outcome.failure)
            done.set()

        address = ("127.0.0.1", self._fleet.gateway_port)
        _, probe = await loop.create_connection(lambda: ProbeConnection(on_end), *address)
        cpu_s, start_s = accounts.cpu_s([self._fleet.gateway_pid]), time.monotonic()
        probe.send(request, start_s)
        async with asyncio.timeout(_PHASE_S):
            await done.wait()
        cores = (accounts.cpu_s([self._fleet.gateway_pid]) - cpu_s) / (time.monotonic() - start_s)
        probe.close()
        if failures != [None]:
            raise StreamError(f"the probe stream was not right: {failures}")
        settled_s = probe.arrivals_s[0] + _PROBE_SETTLE_S / 2
        times = [at for at in probe.arrivals_s if at >= settled_s]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        return Itl(len(times), quantiles_ms(gaps), cores)

    def rss_mib(self) -> float:
        """Resident memory of the gateway now."""
        return float(self._gateway.memory_info().rss) / _MEBIBYTE

    def peak_rss_mib(self) -> float:
        """The most that it has ever been, by the kernel."""
        status = Path(f"/proc/{self._fleet.gateway_pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024

    async def open_crowd(self, num_tokens: int) -> float:
        """Starts all streams; returns after how many seconds each had its first event."""
        start_s = time.monotonic()
        request = _request(_CROWD_MODEL, num_tokens)
        left = self._num_streams
        while left:
            async with asyncio.timeout(_PHASE_S), asyncio.TaskGroup() as tasks:
                for _ in range(min(left, _CONNECTS_AT_ONCE)):
                    tasks.create_task(self._open(request))
                    left -= 1
        await self._until(
            lambda: all(one.num_events or not one.is_open for one in self._crowd),
            "not every stream had its first event",
        )
        return time.monotonic() - start_s

    async def _open(self, request: Request) -> None:
        loop = asyncio.get_running_loop()
        address = ("127.0.0.1", self._fleet.gateway_port)
        _, connection = await loop.create_connection(
            lambda: ClientConnection(self._on_end), *address
        )
        self._crowd.append(connection)
        connection.send(request, time.monotonic())

    def _on_end(self, _: ClientConnection, outcome: Outcome) -> None:
        if outcome.failure is None:
            self._num_completed += 1
        elif not self._has_left:
            self._ended[outcome.failure] += 1

    async def slow(self, num_clients: int) -> list[SlowConnection]:
        """Opens streams that nobody reads, and waits until the gateway's buffers are full."""
        loop = asyncio.get_running_loop()
        request = _request(_PROBE_MODEL, _SLOW_TOKENS).wire
        clients = []
        for _ in range(num_clients):
            own = socket.socket()
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_RECEIVE_BYTES)
            own.setblocking(False)
            await loop.sock_connect(own, ("127.0.0.1", self._fleet.gateway_port))
            _, client = await loop.create_connection(lambda: SlowConnection(request), sock=own)
            clients.append(client)
        return clients

    async def leave(self) -> Leaving:
        """Resets a thousand clients at once and watches the engines."""
        leaving = self._crowd[:_MAX_LEAVING]
        before = await self._running()
        self._has_left = True
        start_s = time.monotonic()
        for connection in leaving:
            connection.close()
        end_s = start_s + _PHASE_S
        while await self._running() > before - len(leaving):
            if time.monotonic() > end_s:
                raise StreamError("the engines still work for clients that have left")
            await asyncio.sleep(_POLL_S)
        freed_s = time.monotonic() - start_s
        await asyncio.sleep(0)
        self._has_left = False
        return Leaving(len(leaving), before, freed_s)

    async def _running(self) -> int:
        loop = asyncio.get_running_loop()
        counts = [
            await loop.run_in_executor(None, running_requests, port)
            for port in self._fleet.crowd_ports
        ]
        return sum(counts)

    async def finish(self) -> None:
        """Waits until the streams that are left have ended, all their events checked."""
        await self._until(
            lambda: all(not one.is_busy for one in self._crowd if one.is_open),
            "streams do not end",
        )
        for connection in self._crowd:
            connection.close()
        await asyncio.sleep(0)

    async def _until(self, condition: Callable[[], bool], complaint: str) -> None:
        end_s = time.monotonic() + _PHASE_S
        while not condition():
            if time.monotonic() > end_s:
                raise StreamError(complaint)
            await asyncio.sleep(_POLL_S)

    def crowd(self, open_s: float, rss_before_mib: float, peak_mib: float) -> Crowd:
        """What became of the many."""
        return Crowd(
            streams=self._num_streams,
            open_s=open_s,
            rss_before_mib=rss_before_mib,
            rss_peak_mib=peak_mib,
            kib_per_stream=(peak_mib - rss_before_mib) * 1024 / self._num_streams,
            events=sum(connection.num_events for connection in self._crowd),
            completed=self._num_completed,
            failures=dict(self._ended),
        )


def running_requests(port: int) -> int:
    """How many requests an engine works on, by its metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    lines = text.splitlines()
    line = next(line for line in lines if line.startswith("vllm:num_requests_running{"))
    return int(float(line.rpartition(" ")[2]))


@contextlib.contextmanager
def running_fleet(folder: Path) -> Iterator[Fleet]:
    """Engines for the crowd, one for the probe, and the gateway over them; all end with it."""
    with contextlib.ExitStack() as stack:
        engines = [(_CROWD_MODEL, _CROWD_INTERVAL_S)] * _NUM_CROWD_ENGINES
        engines.append((_PROBE_MODEL, _PROBE_INTERVAL_S))
        ports = [_start_engine(stack, folder, *engine) for engine in engines]
        gateway, port = Headrace(None).start(
            [("127.0.0.1", port) for port in ports], _GATEWAY_CORE, folder
        )
        stack.enter_context(gateway)
        yield Fleet(port, gateway.pid, tuple(ports[:_NUM_CROWD_ENGINES]))


def _start_engine(stack: contextlib.ExitStack, folder: Path, model: str, interval_s: float) -> int:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.fast_engine", "--port", str(port)]
    command += ["--model", model, "--interval-ms", str(interval_s * 1000)]
    process = PinnedProcess(command, _LOAD_CORE, folder / f"engine-{port}.log")
    stack.enter_context(process).wait_until_ready(port, "/health", _READY_S)
    return port


async def run(fleet: Fleet, num_streams: int, num_slow: int, window_s: float) -> Results:
    """Measures everything, once."""
    one = Measurement(fleet, num_streams, window_s)
    alone = await one.probe()
    slow = await one.slow(num_slow)
    beside_slow = await one.probe()
    for client in slow:
        client.abort()
    rss_before_mib = one.rss_mib()
    # Long enough for opening, the probe and the leaving, on a slow machine too.
    open_s = await one.open_crowd(_crowd_tokens(num_streams, window_s))
    typer.echo(f"{num_streams} streams are open after {open_s:.1f} s", err=True)
    in_crowd = await one.probe()
    peak_mib = one.peak_rss_mib()
    leaving = await one.leave()
    typer.echo(f"{leaving.clients} clients left; the others go on to their end", err=True)
    await one.finish()
    return Results(
        provenance=machine.provenance("benchmarks.many_streams"),
        gateway=Headrace(None).version(),
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        probe_alone=alone,
        probe_in_crowd=in_crowd,
        probe_beside_slow=beside_slow,
        slow_clients=num_slow,
        crowd=one.crowd(open_s, rss_before_mib, peak_mib),
        leaving=leaving,
    )


def _crowd_tokens(num_streams: int, window_s: float) -> int:
    """Length of the crowd's streams: opening, the probe's window, the leaving."""
    return round((num_streams / _OPENS_PER_S + 2 * window_s + _SLACK_S) / _CROWD_INTERVAL_S)


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
            os.sched_setaffinity(0, {_LOAD_CORE})
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
