"""The load generator: one process, one window of measurement, every response checked.

Three ways to load a target: `closed` (each connection sends its next request as soon as it has the
answer), `open` (requests leave at scheduled times whatever happens; latency counts from the
schedule) and `steady` (streams that all begin before the window and end after it, so that nothing
but events happens in between). Reads the CPU accounts of the proxy at both edges of the window, at
the same instant as its own counters. Never starts or stops a proxy. Run by
`benchmarks/gateway_cost.py` as `python -m benchmarks.load PLAN`, where PLAN is a `LoadPlan` in
JSON; prints a `LoadResult` in JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections import Counter, deque
from os import getpid
from typing import TYPE_CHECKING, Literal

import msgspec
import uvloop
from pydantic import BaseModel, ConfigDict, Field

from benchmarks import accounts
from benchmarks.exchange import ClientConnection, Outcome, Request
from benchmarks.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

Mode = Literal["closed", "open", "steady"]

_CONNECT_S = 10.0
_DRAIN_S = 30.0
# Streams of a steady run outlive the window by this, so that a slow proxy ends none inside it.
_MARGIN_S = 0.5
# Events of a chat stream that are not tokens: the role and `[DONE]`.
_EXTRA_EVENTS = 2
_PROMPT = "Tell me what the wheel of a mill does when the water of the headrace reaches it. "


class LoadPlan(BaseModel):
    """One run of the load generator."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode
    targets: tuple[tuple[str, int], ...] = Field(min_length=1)
    """Host and port; connections are dealt out in turn."""
    connections: int = Field(default=32, ge=1)
    window_s: float = Field(default=4.0, gt=0)
    warmup_s: float = Field(default=1.0, ge=0)
    rate_per_s: float = Field(default=200.0, gt=0)
    """Arrivals of an open run; the gaps are exponential, the same in every run."""
    spread_s: float = Field(default=1.0, gt=0)
    """Streams of a steady run begin within this time, their events evenly over an interval."""
    stream: bool = False
    pacing: Literal["staggered", "steps"] = "staggered"
    """How the simulated engine times the events of a stream."""
    num_tokens: int = Field(default=32, ge=1)
    """Length of an answer; a steady run computes its own."""
    interval_s: float = Field(default=0.02, gt=0)
    """Time between two events, as the engines are set; used by a steady run only."""
    prompt_bytes: int = Field(default=600, ge=1)
    model: str = "bench-model"
    api_key: str = ""
    account_pid: int | None = None
    """Root of the process tree whose CPU is measured."""
    support_pids: tuple[int, ...] = ()
    """The engines: their CPU is not foreign."""


class LoadResult(msgspec.Struct):
    """What one run has seen."""

    window_s: float
    num_requests: int
    """Responses completed in the window."""
    num_events: int
    """Server-sent events received in the window."""
    cpu_s: float
    """CPU that the process tree used in the window."""
    foreign_cores: float
    """Cores kept busy by what is no part of the benchmark (from accounts in 10 ms steps)."""
    latency_ms: dict[str, float]
    """Quantiles of an open run, from the scheduled time to the end of the response."""
    failures: dict[str, int]
    """Wrong responses of the whole run by what was wrong."""


class Edge(msgspec.Struct):
    """All counters at one edge of the window."""

    time_s: float
    cpu_s: float
    foreign_cpu_s: float
    num_requests: int
    num_events: int


def build_request(plan: LoadPlan, num_tokens: int) -> Request:
    """The one request that a run repeats."""
    repeated = _PROMPT * (plan.prompt_bytes // len(_PROMPT) + 1)
    body = msgspec.json.encode(
        {
            "model": plan.model,
            "messages": [{"role": "user", "content": repeated[: plan.prompt_bytes]}],
            "max_tokens": num_tokens,
            "temperature": 0.7,
            "stream": plan.stream,
            "pacing": plan.pacing,
        }
    )
    host, port = plan.targets[0]
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        "Accept: application/json\r\nContent-Type: application/json\r\n"
        f"User-Agent: headrace-bench\r\nAuthorization: Bearer {plan.api_key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    num_events = num_tokens + _EXTRA_EVENTS if plan.stream else 0
    return Request(head.encode() + body, num_tokens, num_events)


def quantiles_ms(latencies_s: Sequence[float]) -> dict[str, float]:
    """Nearest-rank quantiles in milliseconds; empty for no samples."""
    ordered = sorted(latencies_s)
    if not ordered:
        return {}
    ranks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {name: ordered[round(rank * last)] * 1000 for name, rank in ranks.items()}


class Run:
    """One run: its connections, its counters, its window."""

    def __init__(self, plan: LoadPlan, schedule: Schedule, group: asyncio.TaskGroup) -> None:
        self._plan = plan
        self._schedule = schedule
        self._group = group
        self._connections: list[ClientConnection] = []
        self._free: deque[ClientConnection] = deque()
        # Bounded by the arrivals of the run: an open run never has more than it has planned.
        self._waiting: deque[float] = deque()
        self._targets = itertools.cycle(plan.targets)
        self._pids = [] if plan.account_pid is None else accounts.process_tree(plan.account_pid)
        self._num_in_flight = 0
        self._num_requests = 0
        self._latencies_s: list[float] = []
        self._failures: Counter[str] = Counter()
        self._is_open_loop = plan.mode == "open"
        self._is_measuring = False
        self._is_over = False
        self._drained = asyncio.Event()
        num_tokens = plan.num_tokens
        if plan.mode == "steady":
            total_s = plan.spread_s + plan.warmup_s + plan.window_s + _MARGIN_S
            num_tokens = round(total_s / plan.interval_s)
        self._request = build_request(plan, num_tokens)

    async def measure(self) -> LoadResult:
        """Connects, loads, measures one window and waits for what is in flight.

        Raises:
            TimeoutError: If connecting or draining takes too long.
        """
        for _ in range(self._plan.connections):
            self._free.append(await self._connect())
        start_s = time.monotonic() + 0.01
        window_start_s = start_s + self._plan.warmup_s
        if self._plan.mode == "steady":
            window_start_s += self._plan.spread_s
        self._start(start_s, window_start_s + self._plan.window_s)
        first = await self._edge(window_start_s)
        self._is_measuring = True
        last = await self._edge(window_start_s + self._plan.window_s)
        self._is_measuring = False
        self._is_over = self._plan.mode == "closed"
        self._drained.clear()
        self._notice_drained()
        async with asyncio.timeout(_DRAIN_S):
            await self._drained.wait()
        return self._result(first, last)

    def close(self) -> None:
        """Closes all connections."""
        for connection in self._connections:
            connection.close()

    def _start(self, start_s: float, end_s: float) -> None:
        plan = self._plan
        if plan.mode == "open":
            # The seed is fixed: every proxy and the control meet the same arrivals.
            gaps = random.Random(1)  # noqa: S311
            at_s = start_s
            while (at_s := at_s + gaps.expovariate(plan.rate_per_s)) < end_s:
                self._schedule.at(at_s, lambda due_s=at_s: self._arrive(due_s))  # type: ignore[misc]
            return
        gap_s = 0.0
        if plan.mode == "steady":
            # Phases fall evenly over one interval: no two streams have their events together.
            num_intervals = round(plan.spread_s / plan.interval_s / plan.connections)
            gap_s = plan.interval_s * (num_intervals + 1 / plan.connections)
        for index in range(len(self._free)):
            at_s = start_s + index * gap_s
            self._schedule.at(at_s, lambda due_s=at_s: self._arrive(due_s))  # type: ignore[misc]

    async def _connect(self) -> ClientConnection:
        host, port = next(self._targets)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_S):
            _, connection = await loop.create_connection(
                lambda: ClientConnection(self._on_end), host, port
            )
        self._connections.append(connection)
        return connection

    def _arrive(self, due_s: float) -> None:
        if not self._free:
            self._waiting.append(due_s)
            return
        self._num_in_flight += 1
        self._free.popleft().send(self._request, due_s)

    def _on_end(self, connection: ClientConnection, outcome: Outcome) -> None:
        self._num_in_flight -= 1
        self._num_requests += 1
        if outcome.failure is not None:
            self._failures[outcome.failure] += 1
        if self._is_measuring and self._is_open_loop:
            self._latencies_s.append(outcome.finished_s - outcome.scheduled_s)
        if connection.is_open:
            self._reuse(connection)
        elif not self._is_over:
            self._num_in_flight += 1
            self._group.create_task(self._replace())
        self._notice_drained()

    def _reuse(self, connection: ClientConnection) -> None:
        if self._plan.mode == "closed" and not self._is_over:
            self._num_in_flight += 1
            connection.send(self._request, time.monotonic())
            return
        self._free.append(connection)
        if self._waiting:
            self._arrive(self._waiting.popleft())

    async def _replace(self) -> None:
        try:
            connection = await self._connect()
        except OSError as error:
            self._failures[f"connect: {error.strerror or 'timed out'}"] += 1
        else:
            self._reuse(connection)
        self._num_in_flight -= 1
        self._notice_drained()

    def _notice_drained(self) -> None:
        if self._num_in_flight == 0 and not self._waiting:
            self._drained.set()

    async def _edge(self, at_s: float) -> Edge:
        reached = asyncio.Event()
        self._schedule.at(at_s, reached.set)
        async with asyncio.timeout(at_s - time.monotonic() + _DRAIN_S):
            await reached.wait()
        cpu_s = accounts.cpu_s(self._pids)
        own_s = cpu_s + accounts.cpu_s([getpid(), *self._plan.support_pids])
        return Edge(
            time_s=time.monotonic(),
            cpu_s=cpu_s,
            foreign_cpu_s=accounts.machine_busy_s() - own_s,
            num_requests=self._num_requests,
            num_events=sum(connection.num_events for connection in self._connections),
        )

    def _result(self, first: Edge, last: Edge) -> LoadResult:
        num_requests = last.num_requests - first.num_requests
        if self._plan.mode == "steady" and num_requests:
            self._failures["stream ended inside the window"] += num_requests
        window_s = last.time_s - first.time_s
        return LoadResult(
            window_s=window_s,
            num_requests=num_requests,
            num_events=last.num_events - first.num_events,
            cpu_s=last.cpu_s - first.cpu_s,
            foreign_cores=max(0.0, last.foreign_cpu_s - first.foreign_cpu_s) / window_s,
            latency_ms=quantiles_ms(self._latencies_s),
            failures=dict(self._failures),
        )


async def run(plan: LoadPlan) -> LoadResult:
    """Runs one plan to its end.

    Resources:
        Closes its timer and its connections.
    """
    schedule = Schedule(asyncio.get_running_loop())
    try:
        async with asyncio.TaskGroup() as group:
            one = Run(plan, schedule, group)
            try:
                return await one.measure()
            finally:
                one.close()
    finally:
        schedule.close()
        # The loop tells the connections in its next turn.
        await asyncio.sleep(0)


def main() -> None:
    """Command line: one plan in JSON as the only argument."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m benchmarks.load PLAN  (a LoadPlan as JSON)")
    plan = LoadPlan.model_validate_json(sys.argv[1])
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(run(plan))) + b"\n")


if __name__ == "__main__":
    main()
