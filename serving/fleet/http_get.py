"""A small GET for probes of replicas: asyncio streams and httptools, one connection a request."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import httptools

MAX_BODY_BYTES = 8 * 1024 * 1024
_READ_BYTES = 65_536


class Got(NamedTuple):
    """A response."""

    status: int
    body: bytes


class _Response:
    """What httptools calls."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.on_body = self.parts.append
        self.is_complete = False

    def on_message_complete(self) -> None:
        self.is_complete = True


async def get(host: str, port: int, path: str, *, timeout_s: float, api_key: str | None) -> Got:
    """GETs `http://host:port{path}`.

    Args:
        host: Name or address.
        port: TCP port.
        path: Absolute path.
        timeout_s: Deadline of the whole, connecting included.
        api_key: Bearer token, or None.

    Raises:
        OSError: If it cannot connect, the connection breaks, the answer is not HTTP or too large,
            or the deadline passes (TimeoutError is an OSError).
    """
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            bearer = f"authorization: Bearer {api_key}\r\n" if api_key else ""
            head = (
                f"GET {path} HTTP/1.1\r\nhost: {host}:{port}\r\n{bearer}connection: close\r\n\r\n"
            )
            writer.write(head.encode())
            return await _read(reader)
        finally:
            writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> Got:
    response = _Response()
    parser = httptools.HttpResponseParser(response)
    received = 0
    while not response.is_complete:
        block = await reader.read(_READ_BYTES)
        if not block:
            raise ConnectionError("the connection closed before the answer was complete")
        received += len(block)
        if received > MAX_BODY_BYTES:
            raise OSError("the answer is too large")
        try:
            parser.feed_data(block)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise OSError(f"the answer is not HTTP: {error}") from error
    return Got(parser.get_status_code(), b"".join(response.parts))
