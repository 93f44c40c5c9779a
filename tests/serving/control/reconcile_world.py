"""What the reconciler needs around it in a test: a ledger in memory, files, and a gateway for probes.

The engines are real HTTP servers (`tests/engines`). The gateway relays a probe as the real one does: to
the replica that the header names, under the engine's own name for the version, and only where the
version is published as loaded or ready.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from prometheus_client import CollectorRegistry

from adapters.manifest import BaseReference, FileEntry, Manifest, Source
from adapters.swap_slot import RetryRules
from serving.control.adapter_metrics import AdapterMetrics
from serving.control.ledger import PendingFlip, PlacementRow, WantedVersion
from serving.control.probe import PROBE_HEADER, GatewayProber
from serving.control.reconcile import Reconciler, ReplicaSpec
from serving.control.sync_parts import SyncLimits
from serving.engines.lora import LoraTarget
from serving.fleet.http_client import post_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence
    from pathlib import Path

    from serving.control.sync_parts import SyncParts

TOKEN = "the control plane's own token"
FAST = SyncLimits(
    tick_s=0.05, placement_s=0.05, follow_s=0.2, drain_s=0.3, probe_wait_s=0.05, linger_s=60.0
)
RULES = RetryRules(first_s=0.02, longest_s=0.05, jitter=0.0, max_attempts=3)
PUBLISHED = ("loaded", "ready", "draining")


def make_version(
    folder: Path,
    name: str,
    lora_id: int,
    *,
    min_copies: int = 1,
    aliased: bool = True,
    **extra: Any,
) -> WantedVersion:
    """Writes a version's files, which are its name and number, and says that it is wanted."""
    text = f"{name} {lora_id}".encode()
    manifest = manifest_of(name, text)
    path = folder / manifest.version
    path.mkdir(parents=True)
    (path / "adapter").write_bytes(text)
    fields = {"lora_id": lora_id, "min_copies": min_copies, "is_aliased": aliased}
    return WantedVersion(manifest.version, manifest, **fields, unloadable={}, **extra)


def manifest_of(name: str, text: bytes, base: str = "m") -> Manifest:
    """The manifest of a version with this content."""
    digest = hashlib.sha256(text).hexdigest()
    return Manifest(
        adapter=name,
        digest=digest,
        files=(FileEntry(path="adapter", size_bytes=len(text), sha256_hex=digest),),
        base=BaseReference(name=base),
        rank=8,
        alpha=16,
        target_modules=("q_proj",),
        dtype="float32",
        num_parameters=1,
        size_bytes=len(text),
        source=Source(kind="upload"),
        created_at="2026-11-24T00:00:00Z",
    )


class MemoryLedger:
    """`ledger.Ledger` in memory.

    Attributes:
        log: What was written, oldest first: (replica, version, phase or "forgotten"), and flips.
    """

    def __init__(self) -> None:
        self.versions: dict[str, WantedVersion] = {}
        self.rows: dict[tuple[str, str], PlacementRow] = {}
        self.flips: dict[str, PendingFlip] = {}
        self.goldens: dict[tuple[str, str], tuple[float, ...]] = {}
        self.failed_flips: dict[str, str] = {}
        self.log: list[tuple[str, ...]] = []

    def want(self, *versions: WantedVersion) -> None:
        """Makes these the only versions."""
        self.versions = {one.version: one for one in versions}

    def phases(self, version: str) -> list[str]:
        """Where it stands, replica by replica."""
        return sorted(row.phase for (_, name), row in self.rows.items() if name == version)

    def history(self, replica: str, version: str) -> list[str]:
        """Phases that were recorded one after the other."""
        told = [entry[2] for entry in self.log if entry[:2] == (replica, version)]
        return [one for n, one in enumerate(told) if n == 0 or told[n - 1] != one]

    def wanted(self) -> Sequence[WantedVersion]:
        return list(self.versions.values())

    def placements(self) -> Sequence[PlacementRow]:
        return list(self.rows.values())

    def record(self, row: PlacementRow) -> None:
        self.rows[row.replica, row.version] = row
        self.log.append((row.replica, row.version, str(row.phase)))

    def forget(self, replica: str, version: str) -> None:
        del self.rows[replica, version]
        self.log.append((replica, version, "forgotten"))

    def pending_flips(self) -> Sequence[PendingFlip]:
        return list(self.flips.values())

    def flip(self, alias: str) -> None:
        self.log.append(("flip", alias, self.flips.pop(alias).target))

    def fail_flip(self, alias: str, reason: str) -> None:
        del self.flips[alias]
        self.failed_flips[alias] = reason

    def golden(self, version: str, engine_kind: str) -> Sequence[float] | None:
        found = self.goldens.get((version, engine_kind))
        return None if found is None else list(found)

    def record_golden(self, version: str, engine_kind: str, logprobs: Sequence[float]) -> None:
        self.goldens.setdefault((version, engine_kind), tuple(logprobs))


class Folders:
    """Files that lie here already.

    Attributes:
        verified: Versions that were to be checked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.verified: list[str] = []

    def fetch(self, manifest: Manifest, in_use: Collection[str], *, verify: bool) -> str:
        if verify:
            self.verified.append(manifest.version)
        return str(self.folder / manifest.version)


class Follows:
    """Gateways that follow, or do not; what they were asked is in the ledger's log."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self.does = True
        self._ledger = ledger

    async def follow(self, timeout_s: float) -> bool:
        self._ledger.log.append(("followed",))
        return self.does


class ProbeGateway:
    """Relays probes. Use as an asynchronous context manager."""

    def __init__(self, ledger: MemoryLedger, kinds: dict[str, str], base: str) -> None:
        self.port = 0
        self.is_open = True
        self._ledger = ledger
        self._kinds = kinds
        self._base = base

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = [line.partition(": ") for line in head.split("\r\n")[1:] if line]
            headers = {name.lower(): value for name, _, value in lines}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            status, told = await self._relay(headers, body)
            writer.write(
                b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(told)) + told
            )
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # whoever asked has left
        finally:
            writer.close()

    async def _relay(self, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, bytes]:
        replica, model = headers[PROBE_HEADER], body["model"]
        if not self.is_open:
            return 503, b'{"error":{"message":"no gateway"}}'
        assert headers["authorization"] == f"Bearer {TOKEN}"
        if model != self._base:
            row = self._ledger.rows.get((replica, model))
            if row is None or row.phase not in PUBLISHED:
                return 404, b'{"error":{"message":"not published there"}}'
            if self._kinds[replica] == "sglang":
                body["model"] = f"m:{model}"
            elif self._kinds[replica] == "tensorrt-llm":
                lora_id = self._ledger.versions[model].lora_id
                asked = {"lora_name": model, "lora_int_id": lora_id, "lora_path": row.path}
                body["lora_request"] = asked
        host, _, port = replica.partition(":")
        text = json.dumps(body).encode()
        try:
            got = await post_json(
                host, int(port), "/v1/completions", text, timeout_s=60.0, api_key=None
            )
        except OSError:
            return 502, b'{"error":{"message":"the replica is gone"}}'
        return got.status, got.body


class World:
    """A reconciler with everything around it.

    Attributes:
        kinds: Replica → its engine's kind.
    """

    def __init__(
        self, folder: Path, replicas: Sequence[tuple[str, Any]], base: str = "m", **limits: Any
    ) -> None:
        self.ledger = MemoryLedger()
        self.files = Folders(folder)
        self.gateways = Follows(self.ledger)
        self.registry = CollectorRegistry()
        self.metrics = AdapterMetrics(self.registry)
        self.names = [f"127.0.0.1:{server.port}" for _, server in replicas]
        self.kinds = dict(zip(self.names, (kind for kind, _ in replicas), strict=True))
        self.gateway = ProbeGateway(self.ledger, self.kinds, base)
        self._servers = [server for _, server in replicas]
        self._limits = limits

    @asynccontextmanager
    async def running(
        self,
        *,
        max_registered: int = 4,
        probe_s: float = 2.0,
        parts: Callable[[SyncParts], None] = lambda parts: None,
    ) -> AsyncIterator[Reconciler]:
        """Runs a reconciler over the ledger as it is."""

        def quick(shared: SyncParts) -> None:
            shared.rules = RULES
            parts(shared)

        specs = [
            ReplicaSpec(
                LoraTarget(name, "127.0.0.1", server.port), self.kinds[name], 2, max_registered
            )
            for name, server in zip(self.names, self._servers, strict=True)
        ]
        limits = {name: getattr(FAST, name) for name in FAST.__slots__} | self._limits
        prober = GatewayProber(f"http://127.0.0.1:{self.gateway.port}", TOKEN, timeout_s=probe_s)
        async with prober, asyncio.TaskGroup() as group:
            reconciler = Reconciler(
                specs,
                ledger=self.ledger,
                files=self.files,
                gateways=self.gateways,
                prober=prober,
                metrics=self.metrics,
                limits=SyncLimits(**limits),
                parts=quick,
            )
            task = group.create_task(reconciler.run())
            try:
                yield reconciler
            finally:
                task.cancel()

    def count(self, name: str, **labels: str) -> float:
        """A sample of the metrics."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def resident(self, version: str) -> float | None:
        """The gauge of a version on the first replica, None where it has gone."""
        labels = {"replica": self.names[0], "version": version}
        return self.registry.get_sample_value("headrace_adapter_resident", labels)
