"""A control plane that does as it is told: its internal routes on a real socket, and nothing behind them.

Long polls wait for `publish`; what gateways ask for and report is kept. It can refuse, answer garbage,
die and come back on its port.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

from eventually import eventually

from serving.routing.published import (
    Placement,
    Published,
    PublishedAlias,
    PublishedVersion,
    encode,
)

if TYPE_CHECKING:
    from types import TracebackType

    from running_gateway import Gateway
    from scripted_engine import ScriptedEngine

TOKEN = "control-token"


def version_of(name: str, digit: str) -> str:
    """A version name whose digest is one digit repeated."""
    return f"{name}@{digit * 12}"


def placed(engine: ScriptedEngine, state: str = "ready", path: str = "/a") -> dict[str, Placement]:
    """A placement on one engine."""
    return {f"127.0.0.1:{engine.port}": Placement(state, path)}  # type: ignore[arg-type]


def adapter(
    *placements: dict[str, Placement], base: str = "m", lora_id: int = 7
) -> PublishedVersion:
    """A version with these placements."""
    merged = {name: one for each in placements for name, one in each.items()}
    return PublishedVersion(base, lora_id, 8, 1024, merged)


def alias(target: str) -> PublishedAlias:
    """An alias made at a known time."""
    return PublishedAlias(target, 1_700_000_000, "team")


def give(engine: ScriptedEngine, *names: str) -> None:
    """Has an engine list adapters, as if they had been loaded."""
    engine.models = [
        engine.models[0],
        *({"id": name, "object": "model", "parent": "m"} for name in names),
    ]


async def until_resolved(gateway: Gateway, name: str, version: str) -> None:
    """Waits until a name means a version that a replica has ready."""

    def is_ready() -> bool:
        model = gateway.worker.snapshot.find(name)
        return model is not None and model.version == version and any(model.healthy.values())

    await eventually(is_ready)


@dataclass
class FakeControl:
    """The server. Use as an asynchronous context manager.

    Attributes:
        published: What gateways get.
        polls: Queries of the long polls, as they came.
        demands: Versions that were asked for.
        reports: Bodies of traffic reports.
        demand_status: How it answers demands.
        garbage: Answered to polls in place of a snapshot.
    """

    published: Published | None = None
    polls: list[dict[str, str]] = field(default_factory=list)
    demands: list[str] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    demand_status: int = 204
    garbage: bytes | None = None
    port: int = 0

    async def __aenter__(self) -> Self:
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        await self.listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.die()

    async def listen(self) -> None:
        """Takes connections, on the port that it had before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """No connections any more; those that wait are cut off."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            self._wake()
            await server.wait_closed()

    def publish(
        self,
        aliases: dict[str, str],
        versions: dict[str, PublishedVersion],
        *,
        epoch: str = "e1",
        number: int | None = None,
    ) -> Published:
        """The next snapshot, for all who wait."""
        before = 0 if self.published is None else self.published.version
        self.published = Published(
            epoch,
            before + 1 if number is None else number,
            {name: alias(target) for name, target in aliases.items()},
            versions,
        )
        self._wake()
        return self.published

    def send_garbage(self, body: bytes) -> None:
        """Whatever polls next gets this."""
        self.garbage = body
        self._wake()

    def _wake(self) -> None:
        woken, self._changed = self._changed, asyncio.Event()
        woken.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        request_line, *lines = head.split("\r\n")
        method, target, _ = request_line.split(" ")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("authorization") != f"bearer {TOKEN}":
            writer.write(b"HTTP/1.1 401 Status\r\ncontent-length: 0\r\n\r\n")
            return
        status, answer = await self._reply(method, target, body)
        if writer.is_closing():
            return
        writer.write(
            b"HTTP/1.1 %d Status\r\ncontent-length: %d\r\n\r\n%b" % (status, len(answer), answer)
        )
        await writer.drain()

    async def _reply(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(target)
        if (method, parts.path) == ("POST", "/internal/v1/demand"):
            self.demands.append(json.loads(body)["version"])
            return self.demand_status, b""
        if (method, parts.path) == ("POST", "/internal/v1/traffic"):
            self.reports.append(json.loads(body))
            return 204, b""
        assert (method, parts.path) == ("GET", "/internal/v1/snapshot")
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.polls.append(query)
        return await self._next_snapshot(query)

    async def _next_snapshot(self, query: dict[str, str]) -> tuple[int, bytes]:
        known = (query.get("epoch", ""), int(query["after"]))
        with suppress(TimeoutError):
            async with asyncio.timeout(float(query["wait_s"])):
                while self._server is not None:
                    if self.garbage is not None:
                        garbage, self.garbage = self.garbage, None
                        return 200, garbage
                    published = self.published
                    if published is not None and (published.epoch, published.version) != known:
                        return 200, encode(published)
                    await self._changed.wait()
        return 204, b""
