"""A gateway worker in the test's own event loop; at its end its accounts must be even."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from eventually import eventually
from fake_control import TOKEN
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from raw_client import RawClient, Response, post

from serving.config import ApiKeyHash, ControlPlane, Resilience
from serving.gateway import metrics
from serving.gateway.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fake_control import FakeControl
    from scripted_engine import ScriptedEngine

    from serving.config import GatewayConfig

NO_CANARY = Resilience(canary=False)
"""For tests that count what an engine was sent: only their own requests reach it."""


@dataclass
class Gateway:
    """A running worker and its address."""

    worker: Worker
    port: int
    engines: tuple[ScriptedEngine, ...]
    stack: AsyncExitStack
    listening: socket.socket

    async def connect(self, receive_buffer_bytes: int | None = None) -> RawClient:
        """A new connection; a small receive buffer makes a client whose slowness is soon felt."""
        own = socket.socket()
        if receive_buffer_bytes is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        own.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", self.port))
        except OSError:
            own.close()
            raise
        limit = 2**16 if receive_buffer_bytes is None else receive_buffer_bytes
        client = RawClient(*await asyncio.open_connection(sock=own, limit=limit))
        self.stack.callback(client.close)
        return client

    async def ask(self, raw: bytes) -> Response:
        """One request on a connection of its own."""
        client = await self.connect()
        await client.send(raw)
        response = await client.response()
        client.close()
        return response

    async def post(
        self, body: object, path: str = "/v1/chat/completions", **headers: str
    ) -> Response:
        """One JSON request on a connection of its own; `x_request_id=…` is the header of that name."""
        return await self.ask(post(body, path, **headers))

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels, from the exposition."""
        return sample_sum(self.exposition(), name, **labels)

    def exposition(self) -> str:
        """What /metrics says."""
        health = self.worker.snapshot.replica_health
        adapters = self.worker.adapter_tables
        return metrics.exposition(self.worker.tables, health, adapters=adapters).decode()

    def outstanding_tokens(self) -> list[float]:
        """What the ledger has charged to each replica."""
        return [self.worker.tables[0].outstanding_tokens[i] for i in range(len(self.engines))]

    def is_even(self) -> bool:
        """Whether nothing is in flight and nothing charged."""
        in_flight = self.metric("headrace_requests_in_flight")
        return not self.worker.exchanges and not any(self.outstanding_tokens()) and not in_flight


def sample_sum(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of `name` in an exposition whose labels include `labels`."""
    lines = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(name))
    return sum(
        sample.value
        for family in text_string_to_metric_families(lines)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def key_hash(key: str) -> ApiKeyHash:
    """What the gateway keeps of a key."""
    return ApiKeyHash(name=key, sha256_hex=hashlib.sha256(key.encode()).hexdigest())


def control_plane(control: FakeControl) -> ControlPlane:
    """How a gateway is told of a control plane."""
    return ControlPlane(url=f"http://127.0.0.1:{control.port}", token=SecretStr(TOKEN))


@asynccontextmanager
async def running(
    config: GatewayConfig, folder: Path, *engines: ScriptedEngine
) -> AsyncIterator[Gateway]:
    """A worker until the end of the block; its accounts must be even then."""
    worker = Worker(config, 0, folder)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    port = listening.getsockname()[1]
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.serve(listening, ready.set))
        await ready.wait()
        try:
            async with AsyncExitStack() as stack:
                gateway = Gateway(worker, port, engines, stack, listening)
                yield gateway
            await eventually(gateway.is_even)
        finally:
            worker.stop()


class StartGateway(Protocol):
    """Starts a worker in front of engines; the rest are fields of its configuration."""

    async def __call__(
        self,
        *engines: ScriptedEngine,
        keys: tuple[str, ...] = (),
        aliases: dict[str, str] | None = None,
        limits: dict[str, int] | None = None,
        resilience: Resilience = NO_CANARY,
        kind: str = "vllm",
        control: FakeControl | None = None,
        state_dir: Path | None = None,
        **timeouts: float,
    ) -> Gateway: ...
