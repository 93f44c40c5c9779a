"""An engine that does as it is told: a real HTTP server that follows vLLM's contract or breaks it.

Owns one listening socket on loopback, records every request, and counts connections, running requests and
aborts, so that a test can assert that a slot was freed. Generates no text. Used by the tests of the gateway
and of the fleet.

A reply is a script: bytes are sent alone (each in a `write` of its own, and the loop turns before the
next), an `asyncio.Event` is waited for, a number is a latency in seconds, an `Act` ends the script.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Sequence
    from types import TracebackType

DATE = b"date: Tue, 24 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n"
GENERATE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
MAX_BUFFERED_BYTES = 16 * 1024


class Act(Enum):
    """How a script can end other than well."""

    FIN = "close the connection"
    RESET = "reset the connection"
    HANG = "send nothing more until the other side leaves"


Step = bytes | float | asyncio.Event | Act


@dataclass(frozen=True)
class Seen:
    """A request as it came in.

    Attributes:
        headers: Lower-case name → value; `head` has them as sent.
        connection: Which connection it came on, counted from 1.
    """

    method: str
    target: str
    headers: dict[str, str]
    head: bytes
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)


@dataclass
class Counts:
    """What the engine's own accounts say."""

    connections: int = 0
    open_connections: int = 0
    running: int = 0
    aborts: int = 0
    bytes_sent: int = 0


def head(status: int, *lines: str) -> bytes:
    """A response head as uvicorn writes it; `lines` are its own headers."""
    text = "".join(f"{line}\r\n" for line in lines).encode()
    return b"HTTP/1.1 %d Status\r\n" % status + DATE + text + b"\r\n"


def chunk(payload: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def json_reply(body: object, status: int = 200, framing: str = "sized") -> list[Step]:
    """A JSON response; `framing` is sized, chunked or closed (delimited by the connection's end)."""
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    content_type = "content-type: application/json"
    if framing == "sized":
        return [head(status, f"content-length: {len(encoded)}", content_type), encoded]
    if framing == "chunked":
        return [
            head(status, content_type, "transfer-encoding: chunked"),
            chunk(encoded),
            b"0\r\n\r\n",
        ]
    return [head(status, content_type, "connection: close"), encoded, Act.FIN]


STREAM_HEAD = head(
    200, "content-type: text/event-stream; charset=utf-8", "transfer-encoding: chunked"
)


def event(payload: object) -> bytes:
    """One server-sent event as vLLM writes it."""
    return b"data: %b\n\n" % json.dumps(payload, separators=(",", ":")).encode()


def stream_reply(events: Iterable[bytes]) -> list[Step]:
    """A stream: the head, each event in a chunk of its own, and the last chunk."""
    return [STREAM_HEAD, *(chunk(one) for one in events), b"0\r\n\r\n"]


def error_body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """vLLM's error body (entrypoints/serve/exception_handling)."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def chat_events(
    response_id: str, model: str, num_tokens: int, *, usage: dict[str, int] | None
) -> list[bytes]:
    """The events of a streamed chat completion: role, one token each, finish, usage, `[DONE]`."""
    base = {"id": response_id, "object": "chat.completion.chunk", "created": 1, "model": model}
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": f"t{number} "}, None) for number in range(num_tokens)]
    deltas += [({}, "length")]
    events = [
        event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})
        for delta, reason in deltas
    ]
    if usage is not None:
        events.append(event({**base, "choices": [], "usage": usage}))
    return [*events, b"data: [DONE]\n\n"]


class ScriptedEngine:
    """The server. Use as an asynchronous context manager.

    Attributes:
        scripts: Replies for the next POSTs, first come first served; then `always`, then vLLM's own.
        is_healthy: Whether `/health` says 200.
        failing_probes: How many of the next GETs of `/health` say 503 all the same.
        probe_script: Reply to every GET, in place of what a well engine says.
        models: Cards of `/v1/models`.
        paths: What `/openapi.json` names, or None where it is switched off.
        num_tokens: Length of the answers that follow vLLM's contract.
        latency_s: How long those take to begin.
        connection_script: What a new connection does before it reads anything.
        tls: Serves over TLS; set before it listens.
        is_reading: Unset to let new connections wait unread, until `read_on`.
    """

    def __init__(self, name: str = "m", port: int = 0) -> None:
        self.scripts: deque[Sequence[Step]] = deque()
        self.always: Sequence[Step] | None = None
        self.is_healthy = True
        self.failing_probes = 0
        self.probe_script: Sequence[Step] | None = None
        self.models: list[dict[str, Any]] = [
            {"id": name, "object": "model", "parent": None, "max_model_len": 2048}
        ]
        self.paths: tuple[str, ...] | None = GENERATE_PATHS
        self.num_tokens = 3
        self.latency_s = 0.0
        self.connection_script: Act | None = None
        self.is_reading = True
        self.requests: list[Seen] = []
        self.probes: list[Seen] = []
        self.counts = Counts()
        self.port = port
        self.tls: ssl.SSLContext | None = None
        self._connections: set[_Connection] = set()
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
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}"

    async def listen(self) -> None:
        """Takes connections, on the same port as before if there was one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self),
            "127.0.0.1",
            self.port,
            reuse_address=True,
            ssl=self.tls,
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
        for connection in list(self._connections):
            connection.reset()

    def close_connections(self) -> None:
        """Closes every open connection, as an idle timeout does."""
        for connection in list(self._connections):
            connection.transport.close()

    def read_on(self) -> None:
        """Ends `is_reading = False`, on open connections too."""
        self.is_reading = True
        for connection in self._connections:
            connection.transport.resume_reading()

    def reply_to(self, seen: Seen) -> Sequence[Step]:
        """The script for a request."""
        if seen.method == "GET":
            return self._probe(seen)
        if self.scripts:
            return self.scripts.popleft()
        return self.always if self.always is not None else self._contract(seen)

    def _probe(self, seen: Seen) -> Sequence[Step]:
        if self.probe_script is not None:
            return self.probe_script
        if seen.target == "/health":
            is_failing = self.failing_probes > 0
            self.failing_probes -= is_failing
            is_well = self.is_healthy and not is_failing
            return [head(200 if is_well else 503, "content-length: 0")]
        if seen.target == "/v1/models":
            return json_reply({"object": "list", "data": self.models})
        if seen.target == "/openapi.json" and self.paths is not None:
            return json_reply({"paths": {path: {} for path in self.paths}})
        return json_reply({"detail": "Not Found"}, status=404)

    def _contract(self, seen: Seen) -> Sequence[Step]:
        """What vLLM answers."""
        body = seen.json
        latency: list[Step] = [self.latency_s] if self.latency_s else []
        model = body.get("model", self.models[0]["id"])
        if model not in [card["id"] for card in self.models]:
            text = f"The model `{model}` does not exist."
            return json_reply(error_body(text, "NotFoundError", 404, "model"), status=404)
        response_id = f"chatcmpl-{seen.headers.get('x-request-id')}"
        usage = {
            "prompt_tokens": 7,
            "total_tokens": 7 + self.num_tokens,
            "completion_tokens": self.num_tokens,
        }
        if body.get("stream"):
            asked = (body.get("stream_options") or {}).get("include_usage")
            events = chat_events(
                response_id, model, self.num_tokens, usage=usage if asked else None
            )
            return [*latency, *stream_reply(events)]
        text = "".join(f"t{number} " for number in range(self.num_tokens))
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": "length"}]
        answer = {"id": response_id, "model": model, "choices": choices, "usage": usage}
        return [*latency, *json_reply(answer)]

    def start(self, connection: _Connection, seen: Seen) -> asyncio.Task[None]:
        """Runs a script on a connection."""
        return self._tasks.create_task(connection.perform(self.reply_to(seen)))

    def add(self, connection: _Connection) -> None:
        """A connection is open."""
        self._connections.add(connection)
        self.counts.connections += 1
        self.counts.open_connections += 1

    def discard(self, connection: _Connection) -> None:
        """A connection is closed."""
        self._connections.discard(connection)
        self.counts.open_connections -= 1


class _Connection(asyncio.Protocol):
    """One connection: reads requests, performs a script for each, notices that the other side left."""

    transport: asyncio.Transport

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self._received = b""
        self._number = 0
        self._performing: asyncio.Task[None] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=MAX_BUFFERED_BYTES)
        self._engine.add(self)
        self._number = self._engine.counts.connections
        if not self._engine.is_reading:
            self.transport.pause_reading()
        if self._engine.connection_script is Act.RESET:
            self.reset()
        elif self._engine.connection_script is Act.FIN:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._performing is None:
            self._next_request()

    def eof_received(self) -> None:
        self._other_side_left()

    def connection_lost(self, exc: Exception | None) -> None:
        self._other_side_left()
        self._engine.discard(self)

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def reset(self) -> None:
        """Closes with a TCP reset."""
        own = self.transport.get_extra_info("socket")
        if own is not None and not self.transport.is_closing():
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def perform(self, script: Sequence[Step]) -> None:
        """Does what the script says, step by step."""
        for step in script:
            if isinstance(step, bytes):
                await self._send(step)
            elif isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Act):
                await self._act(step)
                return
            else:
                await asyncio.sleep(step)
        self._done()
        self._next_request()

    async def _send(self, piece: bytes) -> None:
        await self._may_write.wait()
        self.transport.write(piece)
        self._engine.counts.bytes_sent += len(piece)
        # The other side's loop may be this one: turns let it read before the next piece.
        for _ in range(3):
            await asyncio.sleep(0)

    async def _act(self, act: Act) -> None:
        if act is Act.HANG:
            await asyncio.Event().wait()
        self._done()
        if act is Act.RESET:
            self.reset()
        else:
            self.transport.close()

    def _next_request(self) -> None:
        first, separator, rest = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        request_line, *lines = first.decode("latin-1").split("\r\n")
        method, target, _ = request_line.split(" ")
        pairs = [line.split(":", 1) for line in lines]
        headers = {name.lower(): value.strip() for name, value in pairs}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        self._received = rest[length:]
        seen = Seen(method, target, headers, first, rest[:length], self._number)
        engine = self._engine
        (engine.probes if method == "GET" else engine.requests).append(seen)
        if method != "GET":
            engine.counts.running += 1
        self._is_counted = method != "GET"
        self._performing = engine.start(self, seen)

    def _done(self) -> None:
        if self._performing is not None and self._is_counted:
            self._engine.counts.running -= 1
        self._performing = None

    def _other_side_left(self) -> None:
        performing = self._performing
        if performing is None:
            return
        if self._is_counted:
            self._engine.counts.aborts += 1
        self._done()
        performing.cancel()


class StartEngine(Protocol):
    """Starts an engine that serves one model."""

    async def __call__(self, name: str = "m") -> ScriptedEngine: ...
