"""A server whose test decides how it reads a request's body; what a gateway asks an engine or a control
plane of its own accord, it answers by itself.

Reads no faster than told: what it has not read is in the kernel's buffers, or not sent yet.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self

from eventually import DEADLINE_S

AUDIO_PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations")
_HANDLED = ("/v1/audio/", "/admin/")
_READ_BYTES = 64 * 1024


@dataclass
class Upload:
    """A request whose head has come; its body is read by whoever handles it."""

    method: str
    target: str
    headers: dict[str, str]
    head: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    connection: int

    async def body(self) -> bytes:
        """Reads the whole body by its framing."""
        if self.headers.get("transfer-encoding") == "chunked":
            return b"".join([piece async for piece in self.chunks()])
        return await self.reader.readexactly(int(self.headers.get("content-length", "0")))

    async def chunks(self):
        """Reads chunk by chunk."""
        while size := int((await self.reader.readuntil(b"\r\n")).strip(), 16):
            yield await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"

    async def answer(self, status: int, body: bytes, *lines: str) -> None:
        """Writes a whole response."""
        text = "".join(f"{line}\r\n" for line in lines)
        head = f"HTTP/1.1 {status} Status\r\ncontent-length: {len(body)}\r\n{text}\r\n"
        await self.send(head.encode() + (b"" if self.method == "HEAD" else body))

    async def answer_json(self, payload: object, status: int = 200) -> None:
        """Writes a JSON response."""
        await self.answer(status, json.dumps(payload).encode(), "content-type: application/json")

    async def send(self, piece: bytes) -> None:
        """Writes bytes."""
        self.writer.write(piece)
        await self.writer.drain()

    async def until_left(self) -> None:
        """Reads and drops until the other side has left."""
        while await self.reader.read(_READ_BYTES):
            pass

    def reset(self) -> None:
        """Closes by a TCP reset."""
        own = self.writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Handler = Callable[[Upload], Awaitable[None]]


async def echo_length(upload: Upload) -> None:
    """Reads everything and says how much that was."""
    await upload.answer_json({"text": f"{len(await upload.body())} bytes"})


@dataclass
class StreamingServer:
    """The server. Use as an asynchronous context manager.

    Attributes:
        handler: Handles what is no probe.
        uploads: What it has handled, oldest first.
        models: Names that it serves.
        paths: Routes that it offers.
        num_accepted: Connections so far.
    """

    handler: Handler = echo_length
    uploads: list[Upload] = field(default_factory=list)
    models: tuple[str, ...] = ("m",)
    paths: tuple[str, ...] = AUDIO_PATHS
    port: int = 0
    receive_buffer_bytes: int | None = None
    num_accepted: int = 0

    async def __aenter__(self) -> Self:
        listening = socket.socket()
        if self.receive_buffer_bytes is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer_bytes)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        self._busy: set[asyncio.StreamWriter] = set()
        self._writers: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}
        self._server = await asyncio.start_server(self._serve, sock=listening, limit=_READ_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer, task in list(self._writers.items()):
            writer.transport.abort()
            if task is not None:
                task.cancel()
        async with asyncio.timeout(DEADLINE_S):
            await self._server.wait_closed()

    def close_connections(self) -> None:
        """Closes every open connection, as an idle timeout does."""
        for writer in list(self._writers):
            writer.close()

    @property
    def num_open(self) -> int:
        """Open connections that have carried something to handle."""
        return len(self._busy)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_accepted += 1
        self._writers[writer] = asyncio.current_task()
        try:
            await self._answer_all(reader, writer, self.num_accepted)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._busy.discard(writer)
            del self._writers[writer]
            writer.transport.abort()

    async def _answer_all(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            request_line, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
            method, target, _ = request_line.split(" ")
            pairs = [line.split(": ", 1) for line in lines]
            headers = {name.lower(): value for name, value in pairs}
            assert len(headers) == len(pairs), f"a header twice: {head!r}"
            upload = Upload(method, target, headers, head, reader, writer, connection)
            if not await self._probe(upload):
                self._busy.add(writer)
                self.uploads.append(upload)
                await self.handler(upload)

    async def _probe(self, upload: Upload) -> bool:
        """Answers what a gateway asks by itself, as vLLM would; says whether it was that."""
        pages = {
            "/health": {},
            "/v1/models": {
                "data": [{"id": name, "object": "model", "parent": None} for name in self.models]
            },
            "/openapi.json": {"paths": {path: {} for path in self.paths}},
        }
        if upload.target.startswith(_HANDLED):
            return False
        if upload.method != "GET" or upload.target not in pages:
            await upload.body()
            await upload.answer_json({"detail": "Not Found"}, 404)
            return True
        await upload.answer_json(pages[upload.target])
        return True
