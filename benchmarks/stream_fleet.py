"""The engines and the gateway of a run of many streams, and what the engines say they work on.

Never measures. Called by `benchmarks/many_streams.py` and what it is split into.
"""

from __future__ import annotations

import contextlib
import http.client
import sys
from typing import TYPE_CHECKING

import msgspec

from benchmarks.load import LoadPlan, build_request
from benchmarks.peers import API_KEY, Headrace
from benchmarks.pinned import PinnedProcess, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.exchange import Request

LOAD_CORE = 1
CROWD_MODEL = "crowd-model"
PROBE_MODEL = "probe-model"
CROWD_INTERVAL_S = 1.0
PROBE_INTERVAL_S = 0.02
PHASE_S = 180.0
"""Deadline of each wait for streams."""
POLL_S = 0.01
_GATEWAY_CORE = 0
_NUM_CROWD_ENGINES = 2
_READY_S = 60.0


class StreamError(Exception):
    """The run cannot go on; the message says why."""


class Fleet(msgspec.Struct, frozen=True):
    """The processes of a run."""

    gateway_port: int
    gateway_pid: int
    crowd_ports: tuple[int, ...]

    @property
    def address(self) -> tuple[str, int]:
        """The gateway's."""
        return "127.0.0.1", self.gateway_port


def stream_request(model: str, num_tokens: int) -> Request:
    """A streamed request for so many tokens."""
    plan = LoadPlan(
        mode="closed",
        targets=(("127.0.0.1", 1),),
        model=model,
        api_key=API_KEY,
        stream=True,
        num_tokens=num_tokens,
    )
    return build_request(plan, num_tokens)


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
        engines = [(CROWD_MODEL, CROWD_INTERVAL_S)] * _NUM_CROWD_ENGINES
        engines.append((PROBE_MODEL, PROBE_INTERVAL_S))
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
    process = PinnedProcess(command, LOAD_CORE, folder / f"engine-{port}.log")
    stack.enter_context(process).wait_until_ready(port, "/health", _READY_S)
    return port
