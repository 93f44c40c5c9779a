"""Bytes of an engine: whatever they are, the client gets one valid response, or a reset.

Three digits choose the dialect, the request, and how it ends; the rest is what the engine sends,
one part for each attempt, divided by `SEPARATOR`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fake_fleet import KINDS, MODEL, FakeFleet
from http_check import Incomplete, read_responses
from pieces import at_event_ends, cut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fake_fleet import Client, FakeTransport

    from serving.gateway.upstream import UpstreamConnection

SEPARATOR = b"~~~~"
_CHAT = b'"messages":[{"role":"user","content":"a"}]'
_NAME = b'"model":"%b"' % MODEL.encode()


def _post(path: bytes, body: bytes, first_line_end: bytes = b"HTTP/1.1") -> bytes:
    head = b"POST %b %b\r\nhost: h\r\nconnection: keep-alive\r\ncontent-length: %d\r\n\r\n"
    return head % (path, first_line_end, len(body)) + body


_STREAM = b'{%b,%b,"stream":true}' % (_NAME, _CHAT)
_WITH_USAGE = _STREAM[:-1] + b',"stream_options":{"include_usage":true}}'
_WHOLE = b"{%b,%b}" % (_NAME, _CHAT)
REQUESTS = (
    _post(b"/v1/chat/completions", _STREAM),
    _post(b"/v1/chat/completions", _WITH_USAGE),
    _post(b"/v1/chat/completions", _WHOLE),
    _post(b"/v1/messages", _STREAM),
    _post(b"/v1/responses", _WHOLE),
    _post(b"/v1/chat/completions", _STREAM, b"HTTP/1.0"),
    _post(b"/v1/embeddings", _WHOLE, b"HTTP/1.0"),
)
_NUM_DIGITS = 3
_MAX_ATTEMPTS = 12

_fleet = FakeFleet()


def check(data: bytes) -> None:
    """Answers one request with the input, whole, in pieces, and event by event."""
    if len(data) < _NUM_DIGITS:
        return
    dialect, request, end = data[:_NUM_DIGITS]
    parts = data[_NUM_DIGITS:].split(SEPARATOR)
    for split in (lambda part: [part], cut, at_event_ends):
        client, transport = _fleet.start(KINDS[dialect % len(KINDS)])
        client.data_received(REQUESTS[request % len(REQUESTS)])
        _serve(client, parts, split, end)
        if client.exchange is not None:
            # A client that leaves in the middle has no use for what came so far.
            _fleet.finish(client, transport)
        else:
            _judge(transport)
            _fleet.finish(client, transport)


def _serve(
    client: Client, parts: Sequence[bytes], split: Callable[[bytes], Sequence[bytes]], end: int
) -> None:
    """Plays the engine: a part an attempt, then the end that was chosen."""
    left = list(parts)
    for _ in range(_MAX_ATTEMPTS):
        busy = _fleet.pool.busy()
        if busy is None:
            assert client.exchange is None, "an exchange waits for nothing"
            return
        connection, transport = busy
        if left:
            _send(client, connection, transport, split(left.pop(0)))
        if connection.reader is not None and not _end(client, connection, transport, end, left):
            return
    raise AssertionError("the attempts do not end")


def _send(
    client: Client,
    connection: UpstreamConnection,
    transport: FakeTransport,
    pieces: Sequence[bytes],
) -> None:
    for number, piece in enumerate(pieces):
        if transport.is_closing():
            return
        connection.data_received(piece)
        _fleet.pool.settle()
        if number == 0:
            client.pause_writing()
            client.resume_writing()


def _end(
    client: Client,
    connection: UpstreamConnection,
    transport: FakeTransport,
    end: int,
    left: list[bytes],
) -> bool:
    """Ends what the engine has left open.

    Returns:
        Whether the client is still there.
    """
    if end % 3 == 0 or left:
        transport.deliver_end(connection)
    elif end % 3 == 1:
        for exchange in list(_fleet.worker.exchanges):
            exchange.check_deadlines(time.monotonic() + 1e6)
    else:
        return False
    return True


def _judge(transport: FakeTransport) -> None:
    output = bytes(transport.written)
    try:
        count = read_responses(output, 1)
    except Incomplete:
        assert transport.is_aborted, f"cut off without a reset: {output[-200:]!r}"
        return
    # A body without a length that was broken off ends in a reset, too.
    assert count == 1 or transport.is_aborted, f"{count} responses: {output[:200]!r}"
