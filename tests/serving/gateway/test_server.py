"""The gateway as processes: workers on one port, their sums, restarts, shutdown."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
from base_server import DONE
from eventually import eventually
from gateway_process import ROOT, gateway_process
from prometheus_client.parser import text_string_to_metric_families
from raw_client import get, post
from scripted_engine import STREAM_HEAD, Step, chunk, event

if TYPE_CHECKING:
    from pathlib import Path

    from gateway_process import GatewayProcess
    from raw_client import RawClient
    from scripted_engine import ScriptedEngine

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}
EVENT = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
TWO = ("--workers", "2")


def _gated_stream() -> tuple[asyncio.Event, list[Step]]:
    gate = asyncio.Event()
    return gate, [STREAM_HEAD, chunk(EVENT), gate, chunk(DONE), b"0\r\n\r\n"]


async def _begin_stream(gateway: GatewayProcess) -> RawClient:
    client = await gateway.connect()
    await client.send(post(STREAM))
    assert (await client.head()).status == 200
    assert await client.chunk() == EVENT
    return client


async def test_metrics_of_two_workers(scripted: ScriptedEngine, tmp_path: Path) -> None:
    """N requests on fresh connections are N, whichever worker is asked, and so is all else."""
    async with gateway_process(tmp_path, scripted, flags=TWO) as gateway:
        for _ in range(40):
            assert (await gateway.ask(post(CHAT))).status == 200
        for _ in range(20):
            assert (await gateway.ask(post({"model": "x"}))).status == 404
        assert len(gateway.workers()) == 2
        endpoint = {"endpoint": "/v1/chat/completions"}
        for _ in range(8):
            text = (await gateway.ask(get("/metrics"))).body.decode()
            assert {family.name for family in text_string_to_metric_families(text)} >= {
                "headrace_requests",
                "headrace_requests_in_flight",
                "headrace_request_duration_seconds",
            }
            assert await gateway.metric("headrace_requests_total", code="200", **endpoint) == 40
            assert await gateway.metric("headrace_requests_total", code="404", **endpoint) == 20
            assert await gateway.metric("headrace_errors_total") == 20
            assert await gateway.metric("headrace_prompt_tokens_total", model="m") == 280
            assert await gateway.metric("headrace_completion_tokens_total", model="m") == 120
            assert await gateway.metric("headrace_requests_in_flight") == 0


async def test_killed_worker(scripted: ScriptedEngine, tmp_path: Path) -> None:
    """It is started again; counters do not go back, the gauges count what is left."""
    gate = asyncio.Event()
    scripted.always = [STREAM_HEAD, chunk(EVENT), gate, chunk(DONE), b"0\r\n\r\n"]
    async with gateway_process(tmp_path, scripted, flags=TWO) as gateway:
        for _ in range(30):
            assert (await gateway.ask(post({"model": "x"}))).status == 404
        clients = [await _begin_stream(gateway) for _ in range(24)]
        assert await gateway.metric("headrace_requests_in_flight", model="m") == 24
        first, second = gateway.workers()
        first.kill()
        await eventually(lambda: len(_living(gateway)) == 2 and first not in _living(gateway))
        assert second in _living(gateway)
        await eventually(lambda: scripted.counts.aborts > 0)
        cut = scripted.counts.aborts
        assert 0 < cut < 24
        await _asked_until(gateway, 24 - cut)
        for _ in range(10):
            assert (await gateway.ask(post({"model": "x"}))).status == 404
            assert await gateway.metric("headrace_requests_total", code="404") >= 30
        assert await gateway.metric("headrace_requests_total", code="404") == 40
        gate.set()
        ends = [await _end_of(client) for client in clients]
        assert ends.count(b"") == 24 - cut
        assert await gateway.metric("headrace_requests_total", code="200") == 24 - cut
        assert await gateway.metric("headrace_requests_in_flight") == 0


def _living(gateway: GatewayProcess) -> list[psutil.Process]:
    return [one for one in gateway.workers() if one.status() != psutil.STATUS_ZOMBIE]


async def _asked_until(gateway: GatewayProcess, num_in_flight: int) -> None:
    """Polls /metrics until the new worker has voided what the dead one left."""
    seen: list[float] = []
    for _ in range(500):
        seen.append(await gateway.metric("headrace_requests_in_flight"))
        if seen[-1] == num_in_flight:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"in flight: {seen[0]} … {seen[-1]}, not {num_in_flight}")


async def _end_of(client: RawClient) -> bytes | None:
    """The last chunk, or None where the stream was cut."""
    try:
        while piece := await client.chunk():
            assert piece == DONE
        return piece
    except (ConnectionError, asyncio.IncompleteReadError):
        return None


@pytest.mark.parametrize(
    ("flags", "number"), [((), signal.SIGTERM), ((), signal.SIGINT), (TWO, signal.SIGTERM)]
)
async def test_shutdown(
    scripted: ScriptedEngine, tmp_path: Path, flags: tuple[str, ...], number: signal.Signals
) -> None:
    """The port closes, the stream in flight ends whole, the exit code is 0, no file is left."""
    gate, script = _gated_stream()
    scripted.scripts.append(script)
    async with gateway_process(tmp_path, scripted, flags=flags) as gateway:
        workers = gateway.workers()
        client = await _begin_stream(gateway)
        gateway.process.send_signal(number)
        await eventually(lambda: not _accepts(gateway.port))
        assert gateway.process.returncode is None
        gate.set()
        assert await client.chunk() == DONE
        assert await client.chunk() == b""
        assert await client.rest() == b""
        assert await gateway.end() == 0
        assert not any(worker.is_running() for worker in workers)
    assert _files_in(tmp_path) == []


def _files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _accepts(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


async def test_shutdown_deadline(scripted: ScriptedEngine, tmp_path: Path) -> None:
    """A stream that does not end is cut after the drain's deadline; the exit code is 0 all the same."""
    _, script = _gated_stream()
    scripted.scripts.append(script)
    flags = (*TWO, "--drain-timeout-s", "0.3")
    async with gateway_process(tmp_path, scripted, flags=flags) as gateway:
        client = await _begin_stream(gateway)
        gateway.terminate()
        assert await gateway.end() == 0
        assert await _end_of(client) is None
        await eventually(lambda: scripted.counts.aborts == 1)


async def test_killed_parent(scripted: ScriptedEngine, tmp_path: Path) -> None:
    """Workers, which may open as many files as the system lets them, do not outlive the command."""
    async with gateway_process(tmp_path, scripted, flags=TWO) as gateway:
        workers = gateway.workers()
        assert len(workers) == 2
        for worker in workers:
            # 10,000 streams need 20,000 descriptors.
            soft, hard = worker.rlimit(psutil.RLIMIT_NOFILE)
            assert soft >= min(65_536, hard)
        gateway.process.kill()
        await gateway.end()
        await eventually(lambda: not any(worker.is_running() for worker in workers))
        assert not _accepts(gateway.port)


@pytest.mark.parametrize("flags", [(), TWO], ids=["one worker", "two workers"])
async def test_port_in_use(scripted: ScriptedEngine, flags: tuple[str, ...]) -> None:
    """One line that says so, exit code 2; also where the other holder shares its port."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serving.cli.main", "gateway"),
            *("--listen", address, "--replica", f"vllm={scripted.url}", *flags),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(30):
            _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode() == (
        f"headrace: --listen {address}: Address already in use; choose another address\n"
    )


async def test_replica_key(scripted: ScriptedEngine, tmp_path: Path) -> None:
    """Engines get the key of the environment, in probes and requests; clients never see it."""
    async with gateway_process(tmp_path, scripted, HEADRACE_REPLICA_API_KEY="s3cret") as gateway:
        answer = await gateway.ask(post(CHAT, authorization="Bearer client"))
        assert answer.status == 200
        assert b"s3cret" not in answer.head + answer.body
    seen = [*scripted.requests, *scripted.probes]
    assert {one.headers.get("authorization") for one in seen} == {"Bearer s3cret"}
