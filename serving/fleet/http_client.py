"""A small client for probes of replicas: asyncio streams and httptools, one connection a request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import httptools

if TYPE_CHECKING:
    import ssl

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


async def get(
    host: str,
    port: int,
    path: str,
    *,
    timeout_s: float,
    api_key: str | None,
    tls: ssl.SSLContext | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> Got:
    """GETs a path of a server.

    Args:
        host: Name or address.
        port: TCP port.
        path: Absolute path.
        timeout_s: Deadline of the whole, connecting included.
        api_key: Bearer token, or None.
        tls: For https; None is plain http.
        max_body_bytes: A larger answer is an error.

    Raises:
        OSError: If it cannot connect, the connection breaks, the answer is not HTTP or too large,
            or the deadline passes (TimeoutError is an OSError).
    """
    head = _head("GET", host, port, path, api_key)
    async with asyncio.timeout(timeout_s):
        return await _send(host, port, head + b"\r\n", tls, max_body_bytes)


async def post_json(
    host: str,
    port: int,
    path: str,
    body: bytes,
    *,
    timeout_s: float,
    api_key: str | None,
    tls: ssl.SSLContext | None = None,
) -> Got:
    """POSTs a JSON body; otherwise as `get`."""
    head = _head("POST", host, port, path, api_key)
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with asyncio.timeout(timeout_s):
        return await _send(host, port, head + body, tls, MAX_BODY_BYTES)


def _head(method: str, host: str, port: int, path: str, api_key: str | None) -> bytes:
    bearer = f"authorization: Bearer {api_key}\r\n" if api_key else ""
    lines = f"{method} {path} HTTP/1.1\r\nhost: {host}:{port}\r\n{bearer}connection: close\r\n"
    return lines.encode()


async def _send(
    host: str, port: int, payload: bytes, tls: ssl.SSLContext | None, max_body_bytes: int
) -> Got:
    reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    try:
        writer.write(payload)
        return await _read(reader, max_body_bytes)
    finally:
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader, max_body_bytes: int) -> Got:
    response = _Response()
    parser = httptools.HttpResponseParser(response)
    received = 0
    while not response.is_complete:
        block = await reader.read(_READ_BYTES)
        if not block:
            raise ConnectionError("the connection closed before the answer was complete")
        received += len(block)
        if received > max_body_bytes:
            raise OSError("the answer is too large")
        try:
            parser.feed_data(block)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise OSError(f"the answer is not HTTP: {error}") from error
    return Got(parser.get_status_code(), b"".join(response.parts))
