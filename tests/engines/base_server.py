"""What every dialect server has in common: connections, HTTP, switches and records.

Owns a listening socket on loopback, the parsing of requests (httptools), the writing of answers and
streams, the faults that can be switched on, and the accounts that a test asserts on. Knows no
engine's habits: those are in `sglang_server.py` and `tensorrt_llm_server.py`.

A reply is a generator of steps, run lazily: bytes are sent, a number is a wait in seconds, an
`asyncio.Event` is waited for, an `Act` ends the reply. A reply that its client leaves is closed.

Beside its engine's routes a server has one of its own for tests that run it as a process:
`POST /_control {"switch": value, …}` sets switches and answers with the accounts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Self

from batch import Batch, Generation
from connection import Connection, Reply, sized
from scripted_engine import STREAM_HEAD, Act, Counts, Seen, Step, chunk

if TYPE_CHECKING:
    from types import TracebackType

    from switches import Switches

Handler = Callable[[Seen], Reply]

CONTROL_PATH = "/_control"
DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"


class Failure(Exception):
    """The engine fails in the middle of a generation."""


def page(status: int, payload: object, content_type: str = "application/json") -> Reply:
    """A whole response, at once; bytes and text go as they are, the rest as JSON."""
    if isinstance(payload, str):
        payload = payload.encode()
    body = payload if isinstance(payload, bytes) else json_of(payload)
    yield b"".join(sized(status, body, content_type))


def json_of(payload: object) -> bytes:
    """As FastAPI writes it."""
    return json.dumps(payload, separators=(",", ":")).encode()


class EngineServer(ABC):
    """The server. Use as an asynchronous context manager.

    Attributes:
        routes: (method, path) → handler; `{id}` in a path stands for any one segment.
        requests: What came in by other methods than GET, oldest first.
        probes: What came in by GET.
        counts: Connections, generations that the engine holds, and those it ended because the
            client had left.
    """

    def __init__(self, model: str, port: int, switches: Switches) -> None:
        self.model = model
        self.port = port
        self.switches = switches
        self.batch = Batch()
        self.routes: dict[tuple[str, str], Handler] = {}
        self.requests: list[Seen] = []
        self.probes: list[Seen] = []
        self.counts = Counts()
        self._connections: set[Connection] = set()
        self._busy: set[Connection] = set()
        self._background: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None
        self._tasks: asyncio.TaskGroup

    async def __aenter__(self) -> Self:
        self._tasks = asyncio.TaskGroup()
        await self._tasks.__aenter__()
        await self.listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.die()
        await self._tasks.__aexit__(kind, error, trace)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    async def listen(self) -> None:
        """Takes connections, on the same port as before if there was one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self), "127.0.0.1", self.port, reuse_address=True, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Closes the listening socket; open connections go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def die(self) -> None:
        """Ends as a killed process does: no more connections, open ones reset."""
        self.refuse()
        # A connection that its client has left is busy until that is noticed.
        for connection in self._connections | self._busy:
            connection.end()
        for task in self._background:
            task.cancel()

    def close_connections(self) -> None:
        """Closes every open connection, as an idle timeout does."""
        for connection in list(self._connections):
            connection.transport.close()

    def set(self, **values: object) -> None:
        """Changes switches by name: `server.set(latency_s=1.0)`."""
        self.switches.set(**values)

    # What a dialect says.

    @abstractmethod
    def error_reply(self, status: int, message: str) -> Reply:
        """An error in the engine's shape, for a request that generates."""

    @abstractmethod
    def refusal(self, seen: Seen) -> Reply | None:
        """What the engine says to a request without the right key, or None."""

    # What a dialect uses.

    def reply_to(self, seen: Seen) -> Reply:
        """The reply to one request."""
        path = seen.target.partition("?")[0]
        if path == CONTROL_PATH:
            return self._control(seen)
        (self.probes if seen.method == "GET" else self.requests).append(seen)
        handler = self.routes.get((seen.method, path)) or self._by_pattern(seen.method, path)
        if handler is None:
            return page(404, {"detail": "Not Found"})
        return self.refusal(seen) or handler(seen)

    def _by_pattern(self, method: str, path: str) -> Handler | None:
        segments = path.split("/")
        for (known, pattern), handler in self.routes.items():
            wanted = pattern.split("/")
            if known == method and len(wanted) == len(segments) and "{id}" in wanted:
                pairs = zip(wanted, segments, strict=True)
                if all(one in ("{id}", segment) for one, segment in pairs):
                    return handler
        return None

    def spawn(self, steps: Reply) -> None:
        """Does steps that nobody waits for; nothing is sent."""
        self._background.append(self._tasks.create_task(self._work(steps)))

    @staticmethod
    async def _work(steps: Reply) -> None:
        with closing(steps):
            for step in steps:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, int | float):
                    await asyncio.sleep(step)

    def disturbed(self, handler: Handler) -> Handler:
        """A generating handler with the switches before it."""

        def reply(seen: Seen) -> Reply:
            switches = self.switches
            if switches.reset == "before_head":
                yield Act.RESET
            if switches.hang == "before_head":
                yield Act.HANG
            if switches.latency_s:
                yield switches.latency_s
            if switches.error_status is not None and switches.num_errors != 0:
                if switches.num_errors is not None:
                    switches.num_errors -= 1
                yield from self.error_reply(switches.error_status, "switched on by the test")
                return
            yield from handler(seen)

        return reply

    @contextmanager
    def holding(self, generation: Generation) -> Iterator[None]:
        """The engine holds a generation, running or waiting, until this ends."""
        self.batch.enter(generation)
        self.counts.running += 1
        try:
            yield
        finally:
            self.counts.running -= 1
            self.batch.leave(generation)

    def tokens(self, generation: Generation) -> Iterator[str | Step]:
        """The tokens of a generation that has its place, as strings, and the waits between them.

        Raises:
            Failure: Where `fail_after_tokens` says so.
        """
        for number in range(len(generation.tokens) + 1):
            switches = self.switches
            if number == switches.abort_after_tokens:
                generation.is_aborted = True
            if generation.is_aborted:
                return
            if number == switches.die_after_tokens:
                yield Act.RESET
            if number == switches.fail_after_tokens:
                raise Failure("The engine failed in the middle.")
            if number == len(generation.tokens):
                return
            if switches.token_interval_s:
                yield switches.token_interval_s
            generation.num_sent += 1
            yield generation.tokens[number]

    def begun(self, response_head: bytes) -> Reply:
        """A head, and the faults that come after it."""
        yield response_head
        if self.switches.hang == "after_head":
            yield Act.HANG
        if self.switches.reset == "after_head":
            yield Act.RESET

    def whole(self, status: int, payload: object) -> Reply:
        """A whole JSON answer to a request that generates."""
        response_head, body = sized(status, json_of(payload))
        yield from self.begun(response_head)
        yield body

    def stream(self, events: Iterator[Step]) -> Reply:
        """A stream: each piece of bytes is a chunk of its own, other steps are done between them."""
        yield from self.begun(STREAM_HEAD)
        for step in events:
            yield chunk(step) if isinstance(step, bytes) else step
        yield LAST_CHUNK

    def _control(self, seen: Seen) -> Reply:
        try:
            self.set(**json.loads(seen.body or b"{}"))
        except ValueError as error:
            return page(400, {"error": str(error)})
        counts = dataclasses.asdict(self.counts)
        return page(200, {**counts, "requests": len(self.requests)})

    # What connections use.

    def start(self, connection: Connection, seen: Seen) -> asyncio.Task[None]:
        """Runs a reply on a connection."""
        self._busy.add(connection)
        return self._tasks.create_task(connection.perform(self.reply_to(seen)))

    def add(self, connection: Connection) -> None:
        """A connection is open."""
        self._connections.add(connection)
        self.counts.connections += 1
        self.counts.open_connections += 1

    def done(self, connection: Connection) -> None:
        """The reply on a connection has ended."""
        self._busy.discard(connection)

    def discard(self, connection: Connection) -> None:
        """A connection is closed."""
        self._connections.discard(connection)
        self.counts.open_connections -= 1


async def serve(server: EngineServer) -> None:
    """Runs a server as a process until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with server:
        await stop.wait()
