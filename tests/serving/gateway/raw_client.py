"""A client that is nothing but a socket: what it sends and reads are bytes, it repairs nothing."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from eventually import DEADLINE_S


@dataclass
class Response:
    """A response as a client reads it.

    Attributes:
        chunks: The HTTP chunks it came in, if any; `body` has them joined.
    """

    status: int
    headers: dict[str, str]
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)
    head: bytes = b""

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """`error.code` of an error in OpenAI's shape."""
        code: str | None = self.json["error"]["code"]
        return code


class RawClient:
    """One connection: sends bytes as told, reads responses one at a time, repairs nothing."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *pieces: bytes) -> None:
        """Sends pieces, letting the gateway read each before the next."""
        for piece in pieces:
            self.writer.write(piece)
            for _ in range(3):
                await asyncio.sleep(0)

    async def head(self) -> Response:
        """Reads a response's head alone."""
        async with asyncio.timeout(DEADLINE_S):
            first = await self.reader.readuntil(b"\r\n\r\n")
        status_line, *lines = first.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        pairs = [line.split(": ", 1) for line in lines]
        assert len({name for name, _ in pairs}) == len(pairs), f"a header twice: {first!r}"
        assert status_line.startswith("HTTP/1.1 "), first
        headers = {name.lower(): value for name, value in pairs}
        return Response(int(status_line.split(" ")[1]), headers, head=first)

    async def response(self, *, is_head: bool = False) -> Response:
        """Reads one whole response, by its own framing."""
        response = await self.head()
        headers = response.headers
        async with asyncio.timeout(DEADLINE_S):
            if is_head or response.status < 200 or response.status == 204:
                return response
            if "content-length" in headers:
                response.body = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                while piece := await self.chunk():
                    response.chunks.append(piece)
                response.body = b"".join(response.chunks)
            else:
                response.body = await self.reader.read()
        return response

    async def chunk(self) -> bytes:
        """Reads one HTTP chunk; the last is empty."""
        async with asyncio.timeout(DEADLINE_S):
            size = int((await self.reader.readuntil(b"\r\n")).strip(), 16)
            piece = await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
            return piece

    async def rest(self) -> bytes:
        """Reads until the gateway closes; a reset raises ConnectionResetError."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()

    def close(self) -> None:
        """Leaves."""
        self.writer.transport.abort()


def post(body: object, path: str = "/v1/chat/completions", **headers: str) -> bytes:
    """A POST with a sized body, as bytes."""
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nhost: gateway\r\ncontent-length: {len(encoded)}\r\n{lines}\r\n"
    return head.encode("latin-1") + encoded


def get(target: str, **headers: str) -> bytes:
    """A GET, as bytes."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"GET {target} HTTP/1.1\r\nhost: gateway\r\n{lines}\r\n".encode("latin-1")
