"""A worker without sockets: real tables, routes and exchanges over transports that only remember.

Owns the transports and the pool that hands them out; never decides what a peer sends, which is the
targets' business.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from serving.config import GatewayConfig, Limits, Listen, ReplicaConfig, Resilience
from serving.engines import dialect_of
from serving.gateway.client import ClientConnection
from serving.gateway.endpoints import RELAYED
from serving.gateway.upstream import UpstreamConnection, UpstreamPool
from serving.gateway.worker import Worker
from serving.routing.snapshot import Model, Replica, Snapshot

if TYPE_CHECKING:
    from serving.config import EngineKind
    from serving.gateway.request import Request
    from serving.gateway.upstream import Requester

KINDS: tuple[EngineKind, ...] = ("vllm", "sglang", "tensorrt-llm")
NUM_REPLICAS = 2
MODEL = "m"
_MAX_BODY_BYTES = 1024
"""Small, so that inputs of a few kilobytes reach it."""


class FakeTransport(asyncio.Transport):
    """Remembers what was written; tells of its end when `deliver_end` is called, as a loop would.

    Attributes:
        written: All bytes so far.
        is_aborted: Whether it was reset instead of closed.
        is_paused: Whether its owner does not want to read.
        has_ended: Whether its owner has ended what it sends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_aborted = False
        self.is_paused = False
        self.has_ended = False
        self._is_closing = False
        self._is_lost = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Remembers; a closed transport drops."""
        assert not self.has_ended or self._is_closing, "bytes after the end of the stream"
        if not self._is_closing:
            self.written += data

    def write_eof(self) -> None:
        """Ends this direction."""
        self.has_ended = True

    def can_write_eof(self) -> bool:
        """As TCP."""
        return True

    def close(self) -> None:
        """Ends both directions."""
        self.has_ended = True
        self._is_closing = True

    def abort(self) -> None:
        """Resets."""
        self.is_aborted = self.is_aborted or not self.has_ended
        self._is_closing = True

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called."""
        return self._is_closing

    def pause_reading(self) -> None:
        """Nothing is delivered from here on."""
        self.is_paused = True

    def resume_reading(self) -> None:
        """Bytes are delivered again."""
        self.is_paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing is ever buffered."""

    def get_write_buffer_size(self) -> int:
        """Nothing."""
        return 0

    def deliver_end(self, protocol: asyncio.Protocol) -> None:
        """Tells the protocol once that the connection is lost."""
        self._is_closing = True
        if not self._is_lost:
            self._is_lost = True
            protocol.connection_lost(None)


class FakePool(UpstreamPool):
    """Opens connections when it is told to.

    Attributes:
        made: Every connection of the run with its transport.
    """

    def __init__(self) -> None:
        super().__init__(cast("asyncio.TaskGroup", None), connect_timeout_s=1.0)
        self.made: list[tuple[UpstreamConnection, FakeTransport]] = []
        self._wanted: list[tuple[Replica, Requester]] = []

    def connect(self, replica: Replica, requester: Requester) -> None:
        """Notes the wish: a loop would fulfil it in a later turn."""
        self._wanted.append((replica, requester))

    def settle(self) -> None:
        """Opens what was wanted and tells of what was closed, until nothing is left to do."""
        while self._wanted:
            replica, requester = self._wanted.pop(0)
            connection, transport = UpstreamConnection(self, replica), FakeTransport()
            connection.connection_made(transport)
            self.made.append((connection, transport))
            requester.connected(connection)
        for connection, transport in self.made:
            if transport.is_closing():
                transport.deliver_end(connection)

    def busy(self) -> tuple[UpstreamConnection, FakeTransport] | None:
        """The connection that waits for a response to a whole request, if any."""
        self.settle()
        return next((one for one in self.made if _is_waiting(one[0])), None)


def _is_waiting(connection: UpstreamConnection) -> bool:
    body = connection.body
    return connection.reader is not None and (body is None or body.is_complete)


class Client(ClientConnection):
    """A client's connection that keeps what it has begun to answer.

    Attributes:
        begun: The requests in their order, each with its body.
    """

    __slots__ = ("begun",)

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.begun: list[tuple[Request, bytes]] = []

    def _begin(self, request: Request) -> None:
        self.begun.append((request, request.body()))
        super()._begin(request)


def _snapshot(kind: EngineKind) -> Snapshot:
    dialect = dialect_of(kind)
    replicas = tuple(
        Replica(index, f"{kind}-{index}", "127.0.0.1", 9001 + index, dialect)
        for index in range(NUM_REPLICAS)
    )
    engine_name = dialect.engine_name(MODEL, "base")
    model = Model(
        MODEL,
        MODEL,
        {replica.index: engine_name for replica in replicas},
        None,
        None,
        dict.fromkeys(RELAYED, replicas),
        frozenset(RELAYED),
    )
    return Snapshot(
        models={MODEL: model},
        routable=dict(enumerate(replicas)),
        default_model=model,
        is_complete=True,
        is_ready=True,
    )


SNAPSHOTS = {kind: _snapshot(kind) for kind in KINDS}


class FakeFleet:
    """One worker for all runs of a process; `start` gives it an engine and a clean pool."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-fuzz-")
        config = GatewayConfig(
            listen=Listen(host="127.0.0.1", port=0),
            replicas=tuple(
                ReplicaConfig.parse(f"vllm=http://127.0.0.1:{9001 + index}")
                for index in range(NUM_REPLICAS)
            ),
            limits=Limits(max_body_bytes=_MAX_BODY_BYTES, max_target_bytes=256, max_pipelined=2),
            # Time must not decide about retries: an input has to do the same each time.
            resilience=Resilience(min_retries_per_s=1e9),
        )
        self.worker = Worker(config, 0, Path(self._folder.name))
        self.worker.date = b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
        self.pool = FakePool()

    def start(self, kind: EngineKind) -> tuple[Client, FakeTransport]:
        """A new client's connection over engines of one kind."""
        # What a failed run left would be blamed on all after it.
        self.worker.exchanges.clear()
        self.worker.connections.clear()
        for index in range(NUM_REPLICAS):
            self.worker.tables[0].outstanding_tokens[index] = 0.0
        self.worker.snapshot = SNAPSHOTS[kind]
        self.worker.pool = self.pool = FakePool()
        client, transport = Client(self.worker), FakeTransport()
        client.connection_made(transport)
        return client, transport

    def finish(self, client: Client, transport: FakeTransport) -> None:
        """Ends the connection and checks that nothing is left of it."""
        transport.deliver_end(client)
        self.pool.settle()
        assert self.pool.busy() is None, "a replica still works for a client that has left"
        self.pool.close_idle(float("inf"))
        self.pool.settle()
        worker = self.worker
        assert not worker.exchanges, "an exchange outlived its client"
        assert not worker.connections, "a connection outlived its client"
        charged = [worker.tables[0].outstanding_tokens[index] for index in range(NUM_REPLICAS)]
        assert not any(charged), f"still charged: {charged}"
