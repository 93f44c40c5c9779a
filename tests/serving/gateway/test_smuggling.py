"""Requests whose end two servers could see in different places: refused with 400, and the connection closed.

Each case ends with a request of its own for `/healthz`: it must never be answered.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, NamedTuple

import pytest
from eventually import eventually
from raw_client import get, post

if TYPE_CHECKING:
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine

CHAT = b'{"model":"m","messages":[]}'
PATH = b"/v1/chat/completions"
CHUNKED = b"transfer-encoding: chunked"
ONE = b"%x\r\n%b\r\n0\r\n\r\n" % (len(CHAT), CHAT)
"""The body in one chunk."""
SMUGGLED = get("/healthz")


class Case(NamedTuple):
    """A head's lines and a body."""

    name: str
    lines: tuple[bytes, ...]
    body: bytes = ONE
    first: bytes = b"POST " + PATH + b" HTTP/1.1"

    @property
    def raw(self) -> bytes:
        """What is sent."""
        return b"\r\n".join((self.first, b"host: h", *self.lines)) + b"\r\n\r\n" + self.body


def _chunks(name: str, body: bytes) -> Case:
    return Case(name, (CHUNKED,), body)


LENGTH = b"content-length: %d" % len(CHAT)
REFUSED = [
    # Two answers to where the body ends.
    Case("CL then TE", (LENGTH, CHUNKED)),
    Case("TE then CL", (CHUNKED, LENGTH)),
    Case("TE then CL 0", (CHUNKED, b"content-length: 0")),
    Case("two lengths", (LENGTH, b"content-length: 5"), CHAT),
    Case("the same length twice", (LENGTH, LENGTH), CHAT),
    Case("list of lengths", (b"content-length: 27, 27",), CHAT),
    Case("two numbers in a length", (b"content-length: 27 5",), CHAT),
    Case("plus in a length", (b"content-length: +27",), CHAT),
    Case("minus in a length", (b"content-length: -1",), CHAT),
    Case("hexadecimal length", (b"content-length: 0x1b",), CHAT),
    Case("length with an underscore", (b"content-length: 2_7",), CHAT),
    Case("length past 64 bits", (b"content-length: 18446744073709551617",), CHAT),
    Case("no number as length", (b"content-length: x",), CHAT),
    Case("empty length", (b"content-length:",), CHAT),
    # Transfer codings.
    Case("chunked twice", (CHUNKED, CHUNKED)),
    Case("chunked, chunked", (b"transfer-encoding: chunked, chunked",)),
    Case("gzip, chunked", (b"transfer-encoding: gzip, chunked",)),
    Case("identity, chunked", (b"transfer-encoding: identity, chunked",)),
    Case("chunked, identity", (b"transfer-encoding: chunked, identity",)),
    Case("gzip, then chunked", (b"transfer-encoding: gzip", CHUNKED)),
    Case(
        "gzip, then chunked in capitals",
        (b"transfer-encoding: gzip", b"TRANSFER-ENCODING: chunked"),
    ),
    Case(
        "chunked in capitals, then gzip",
        (b"TRANSFER-ENCODING: chunked", b"transfer-encoding: gzip"),
    ),
    Case("empty list item", (b"transfer-encoding: ,chunked",)),
    Case("xchunked", (b"transfer-encoding: xchunked",)),
    Case("quoted", (b'transfer-encoding: "chunked"',)),
    Case("with a parameter", (b"transfer-encoding: chunked;q=1",)),
    Case("identity", (b"transfer-encoding: identity",)),
    Case("empty coding", (b"transfer-encoding:",)),
    Case("vertical tab before", (b"transfer-encoding: \x0bchunked",)),
    Case("NUL before", (b"transfer-encoding: \0chunked",)),
    Case("chunked in HTTP/1.0", (CHUNKED,), ONE, b"POST " + PATH + b" HTTP/1.0"),
    # Header lines.
    Case("folded coding", (b"transfer-encoding:", b" chunked")),
    Case("folded length", (b"content-length: 2", b" 7"), CHAT),
    Case("folded header", (b"x: a", b"\tb", LENGTH), CHAT),
    Case("space before the first header", (LENGTH,), CHAT, b"POST " + PATH + b" HTTP/1.1\r\n x: a"),
    Case("space before the colon", (b"content-length : 27",), CHAT),
    Case("tab before the colon", (b"content-length\t: 27",), CHAT),
    Case("space in a name", (b"content length: 27",), CHAT),
    Case("NUL in a name", (b"x\0: a", LENGTH), CHAT),
    Case("NUL in a value", (b"x: a\0b", LENGTH), CHAT),
    Case("control in a value", (b"x: a\x01b", LENGTH), CHAT),
    Case("no name", (b": a", LENGTH), CHAT),
    Case("no colon", (b"abc", LENGTH), CHAT),
    Case("bare LF between headers", (b"x: a\ncontent-length: 27",), CHAT),
    Case("bare CR between headers", (b"x: a\rcontent-length: 27",), CHAT),
    Case("two CRs", (b"x: a\r", LENGTH), CHAT),
    Case("bare LF at the head's end", (b"x: a\r\n\ny: b",), CHAT),
    Case("bare LF after the request line", (LENGTH,), CHAT, b"POST " + PATH + b" HTTP/1.1\nx: a"),
    Case("space after the version", (LENGTH,), CHAT, b"POST " + PATH + b" HTTP/1.1 "),
    Case("tabs in the request line", (LENGTH,), CHAT, b"POST\t" + PATH + b"\tHTTP/1.1"),
    # Chunks.
    _chunks("no size", b"\r\n\r\n"),
    _chunks("not hexadecimal", b"g\r\nx\r\n0\r\n\r\n"),
    _chunks("prefixed size", b"0x1\r\nx\r\n0\r\n\r\n"),
    _chunks("signed size", b"+1\r\nx\r\n0\r\n\r\n"),
    _chunks("negative size", b"-1\r\nx\r\n0\r\n\r\n"),
    _chunks("underscore in a size", b"1_0\r\nx\r\n0\r\n\r\n"),
    _chunks("space before a size", b" 1\r\nx\r\n0\r\n\r\n"),
    _chunks("space after a size", b"1 \r\nx\r\n0\r\n\r\n"),
    _chunks("size past 64 bits", b"10000000000000001\r\nx\r\n0\r\n\r\n"),
    _chunks("LF after a size", b"1\nx\r\n0\r\n\r\n"),
    _chunks("LF after data", b"1\r\nx\n0\r\n\r\n"),
    _chunks("data longer than its size", b"1\r\nxy\r\n0\r\n\r\n"),
    _chunks("data shorter than its size", b"3\r\nx\r\n0\r\n\r\n"),
    _chunks("LF in an extension", b"1;a\nb\r\nx\r\n0\r\n\r\n"),
    _chunks("space before an extension", b"1 ;a=b\r\nx\r\n0\r\n\r\n"),
    _chunks("LF at the end", b"1\r\nx\r\n0\n\n"),
    _chunks("length in the trailers", b"1\r\nx\r\n0\r\ncontent-length: 5\r\n\r\n"),
    _chunks("coding in the trailers", b"1\r\nx\r\n0\r\ntransfer-encoding: chunked\r\n\r\n"),
    _chunks("folded trailer", b"1\r\nx\r\n0\r\na: b\r\n c\r\n\r\n"),
    _chunks("endless extension", b"1;" + b"a" * 1_000_000 + b"\r\nx\r\n0\r\n\r\n"),
    _chunks("extensions around every byte", (b"1;" + b"a" * 99 + b"\r\nx\r\n") * 3000),
    _chunks("zeros before a size", b"0" * 1_000_000 + b"1\r\nx\r\n0\r\n\r\n"),
]

ACCEPTED = [
    Case("sized", (LENGTH,), CHAT),
    Case("zeros before a length", (b"content-length: 00027",), CHAT),
    Case("chunked", (CHUNKED,)),
    Case("capitals", (b"Transfer-Encoding: Chunked",)),
    Case("spaces around", (b"transfer-encoding: \t chunked ",)),
    _chunks("capital size", ONE.upper().replace(CHAT.upper(), CHAT)),
    _chunks("extension", ONE.replace(b"\r\n", b';a=b;c="d"\r\n', 1)),
    _chunks("trailer", ONE[:-2] + b"x: y\r\n\r\n"),
    _chunks("one byte a chunk", b"".join(b"1\r\n%c\r\n" % one for one in CHAT) + b"0\r\n\r\n"),
    Case("close", (b"connection: close", LENGTH), CHAT),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
async def test_refused(case: Case, scripted: ScriptedEngine, gateway: Gateway) -> None:
    """400, the connection closed, one answer only, nothing for the engine."""
    client = await gateway.connect()
    await client.send(case.raw + SMUGGLED)
    answer = await client.response()
    assert (answer.status, answer.code) == (400, "malformed_http"), answer.body
    assert answer.headers["connection"] == "close"
    assert await client.rest() == b""
    assert scripted.requests == []


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
async def test_refused_in_pieces(case: Case, scripted: ScriptedEngine, gateway: Gateway) -> None:
    """The same where the head and the body come in other blocks, after a good request."""
    client = await gateway.connect()
    head, separator, rest = case.raw.partition(b"\r\n\r\n")
    pieces = (head[:-7], head[-7:], separator, rest[:5], rest[5:], SMUGGLED)
    await client.send(post(CHAT), *[piece for piece in pieces if piece])
    assert (await client.response()).status == 200
    answer = await client.response()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert await client.rest() == b""
    assert len(scripted.requests) == 1


@pytest.mark.parametrize("case", ACCEPTED, ids=[case.name for case in ACCEPTED])
async def test_accepted(case: Case, scripted: ScriptedEngine, gateway: Gateway) -> None:
    """What is well-framed is one request; the next one on the connection is another."""
    client = await gateway.connect()
    await client.send(case.raw + SMUGGLED)
    assert (await client.response()).status == 200
    if case.name == "close":
        assert await client.rest() == b""
    else:
        assert (await client.response()).json == {"status": "ok"}
    assert [seen.json for seen in scripted.requests] == [{"model": "m", "messages": []}]
    assert "transfer-encoding" not in scripted.requests[0].headers


async def test_host_is_needed(gateway: Gateway) -> None:
    """HTTP/1.1 without a Host is refused (RFC 9112, section 3.2); HTTP/1.0 never had it."""
    answer = await gateway.ask(b"GET /healthz HTTP/1.1\r\n\r\n")
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert (await gateway.ask(b"GET /healthz HTTP/1.0\r\n\r\n")).status == 200


@pytest.mark.usefixtures("quick_sweep")
async def test_trickling_body(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """A body that goes on and on, a byte at a time, ends at its total deadline."""
    gateway = await start_gateway(scripted, client_body_total_s=0.3)
    client = await gateway.connect()
    await client.send(post(b"x" * 1000)[:-1000])
    pieces = 0

    def trickles() -> bool:
        nonlocal pieces
        pieces += 1
        client.writer.write(b"x")
        return gateway.metric("headrace_requests_total", code="408") == 1

    await eventually(trickles)
    assert pieces > 5
    answer = await client.response()
    assert (answer.status, answer.code, answer.headers["connection"]) == (
        408,
        "request_timeout",
        "close",
    )


async def test_half_open_connections_are_probed(scripted: ScriptedEngine, gateway: Gateway) -> None:
    """Keepalive is on, on both sides: a peer that vanished is noticed."""
    client = await gateway.connect()
    await client.send(post(CHAT))
    assert (await client.response()).status == 200
    (connection,) = gateway.worker.connections
    (upstream,) = gateway.worker.pool._idle[0]
    for transport in (connection._transport, upstream.transport):
        own = transport.get_extra_info("socket")
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
