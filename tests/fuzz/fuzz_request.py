"""Bytes of a client: whatever they are, they are answered or refused, however they are split.

The input is what the client sends. Every request that is relayed gets a whole answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fake_fleet import FakeFleet
from http_check import Incomplete, read_responses
from pieces import cut

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fake_fleet import Client

    from serving.gateway.request import Request

_ANSWER = b'HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{"choices":[]}'
_MAX_TURNS = 10_000

_fleet = FakeFleet()


def check(data: bytes) -> None:
    """Sends the input whole and in pieces, and compares the requests that came of it."""
    whole, pieces = _exchange([data]), _exchange(cut(data))
    assert whole == pieces, f"the split matters:\n{whole}\n{pieces}"


def _exchange(pieces: Sequence[bytes]) -> list[tuple[object, ...]]:
    client, transport = _fleet.start("vllm")
    for piece in pieces:
        if transport.is_closing():
            break
        client.data_received(piece)
        _answer_all(client)
    requests = _comparable(client)
    num_begun, num_relaying = len(client.begun), int(client.exchange is not None)
    is_head = any(request.is_head for request, _ in client.begun)
    output = bytes(transport.written)
    _fleet.finish(client, transport)
    # Heads without bodies between others need the order of both: heads are looked at alone.
    if not is_head:
        try:
            count = read_responses(output, num_begun)
        except Incomplete:
            raise AssertionError(f"an answer is cut off: {output[-200:]!r}") from None
        assert count == num_begun - num_relaying, f"{count} answers to {num_begun} requests"
    return requests


def _answer_all(client: Client) -> None:
    for _ in range(_MAX_TURNS):
        busy = _fleet.pool.busy()
        if busy is None:
            exchange = client.exchange
            if exchange is not None:
                streamed = exchange.request.streamed
                assert streamed is not None, "a request waits for nothing"
                assert not streamed.is_complete, "a whole request waits for nothing"
            return
        busy[0].data_received(_ANSWER)
    raise AssertionError("the requests do not end")


def _comparable(client: Client) -> list[tuple[object, ...]]:
    """Those before the first one that is relayed while it comes: where it is refused in the middle, how
    far it had come by then, and what counts behind it, is a matter of the split.
    """
    described: list[tuple[object, ...]] = []
    for request, body in client.begun:
        if request.endpoint is not None and request.endpoint.kind != "json":
            break
        described.append(_described(request, body))
    return described


def _described(request: Request, body: bytes) -> tuple[object, ...]:
    """What of a request must not depend on how it came in."""
    if request.refusal is not None:
        # How much of it was read before the refusal is nobody's business.
        return request.refusal.status, request.keep_alive
    assert request.path, "an accepted request without a path"
    assert len(body) == request.body_bytes <= _fleet.worker.config.limits.max_body_bytes
    return (
        request.method,
        request.target,
        request.path,
        tuple(request.headers.items()),
        request.keep_alive,
        request.is_http10,
        body,
    )
