"""The real command in a process of its own, ended with all its workers."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from eventually import DEADLINE_S, eventually
from raw_client import RawClient, Response, get
from running_gateway import sample_sum

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from scripted_engine import ScriptedEngine

ROOT = Path(__file__).parents[3]
_READY = re.compile(r"headrace gateway: serving on http://127\.0\.0\.1:(\d+)\n")


@dataclass
class GatewayProcess:
    """A running `headrace gateway` and its port."""

    process: asyncio.subprocess.Process
    port: int
    stack: ExitStack

    async def connect(self) -> RawClient:
        """A new connection, closed at the end of the block."""
        client = RawClient(*await asyncio.open_connection("127.0.0.1", self.port))
        self.stack.callback(client.close)
        return client

    async def ask(self, raw: bytes) -> Response:
        """One request on a connection of its own."""
        client = await self.connect()
        await client.send(raw)
        response = await client.response()
        client.close()
        return response

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples, from /metrics of whichever worker answers."""
        text = (await self.ask(get("/metrics"))).body.decode()
        return sample_sum(text, name, **labels)

    def workers(self) -> list[psutil.Process]:
        """The worker processes; none if the gateway runs in one process."""
        parent = psutil.Process(self.process.pid)
        return [child for child in parent.children() if _is_worker(child)]

    def terminate(self) -> None:
        """Asks for the drain."""
        self.process.send_signal(signal.SIGTERM)

    async def end(self) -> int:
        """Exit code, once it has ended."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.process.wait()


@asynccontextmanager
async def gateway_process(
    folder: Path, *engines: ScriptedEngine, flags: tuple[str, ...] = (), **environment: str
) -> AsyncIterator[GatewayProcess]:
    """`headrace gateway` before these engines, until the end of the block.

    Args:
        folder: For its temporary files.
        engines: The replicas.
        flags: Further flags.
        environment: Further variables. Canaries are off unless one says otherwise.
    """
    replicas = [part for engine in engines for part in ("--replica", f"vllm={engine.url}")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serving.cli.main", "gateway", "--listen", "127.0.0.1:0"),
        *replicas,
        *flags,
        cwd=ROOT,
        env={
            **os.environ,
            "TMPDIR": str(folder),
            "HEADRACE_RESILIENCE_CANARY": "false",
            **environment,
        },
        stdout=asyncio.subprocess.PIPE,
    )
    started: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            said = (await process.stdout.readline()).decode()
        match = _READY.fullmatch(said)
        assert match, said
        started = psutil.Process(process.pid).children(recursive=True)
        with ExitStack() as stack:
            yield GatewayProcess(process, int(match[1]), stack)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        # Workers end by themselves when their parent is gone.
        await eventually(lambda: not any(_is_alive(child) for child in started))


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has just ended, and may not have been reaped yet
        return False


def _is_alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
