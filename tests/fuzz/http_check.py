"""Whether the bytes that a client got are HTTP/1.1 responses, by a reader of its own.

Strict on purpose, and independent of the parser that the gateway uses.
"""

from __future__ import annotations

import re

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-9]\d\d) [^\r\n]*\Z")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([^\r\n\0]*)\Z")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(?:;[^\r\n]*)?\Z")


class FramingError(AssertionError):
    """The client cannot read this."""


class Incomplete(Exception):
    """The bytes end within a response."""


def read_responses(data: bytes, num_responses: int, *, is_head: bool = False) -> int:
    """Reads responses until the bytes end.

    Args:
        data: All that was written to one client.
        num_responses: The most that there may be, interim ones not counted.
        is_head: Whether they answer HEAD, so that none has a body.

    Returns:
        How many there are.

    Raises:
        FramingError: If they are not valid, or too many.
        Incomplete: If the last one is cut off.
    """
    at = count = 0
    while at < len(data):
        status, headers, at = _head(data, at)
        if status < 200:
            continue
        count += 1
        if count > num_responses:
            raise FramingError(f"{count} responses to {num_responses} requests")
        if not is_head and status not in (204, 304):
            at = _body(data, at, headers)
    return count


def _line(data: bytes, at: int) -> tuple[bytes, int]:
    end = data.find(b"\r\n", at)
    if end < 0:
        raise Incomplete
    return data[at:end], end + 2


def _head(data: bytes, at: int) -> tuple[int, dict[bytes, bytes], int]:
    line, at = _line(data, at)
    found = _STATUS_LINE.match(line)
    if found is None:
        raise FramingError(f"not a status line: {line[:80]!r}")
    headers: dict[bytes, bytes] = {}
    while True:
        line, at = _line(data, at)
        if not line:
            return int(found.group(1)), headers, at
        field = _HEADER.match(line)
        if field is None:
            raise FramingError(f"not a header: {line[:80]!r}")
        name = field.group(1).lower()
        if name in headers:
            raise FramingError(f"repeated header: {name!r}")
        headers[name] = field.group(2)


def _body(data: bytes, at: int, headers: dict[bytes, bytes]) -> int:
    length, coding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if length is not None and coding is not None:
        raise FramingError("both lengths")
    if coding is not None:
        return _chunked(data, at)
    if length is None:
        if headers.get(b"connection") != b"close":
            raise FramingError("a body without an end")
        return len(data)
    if not length.isdigit():
        raise FramingError(f"not a length: {length!r}")
    if at + int(length) > len(data):
        raise Incomplete
    return at + int(length)


def _chunked(data: bytes, at: int) -> int:
    while True:
        line, at = _line(data, at)
        found = _CHUNK_SIZE.match(line)
        if found is None:
            raise FramingError(f"not a chunk size: {line[:80]!r}")
        size = int(found.group(1), 16)
        if not size:
            break
        at += size
        if len(data) < at + 2:
            raise Incomplete
        if data[at : at + 2] != b"\r\n":
            raise FramingError("a chunk is longer than its size")
        at += 2
    while True:
        line, at = _line(data, at)
        if not line:
            return at
