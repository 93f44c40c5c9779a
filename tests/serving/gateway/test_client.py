"""A client's connection: keep-alive, pipelining, bodies, `Expect`, HEAD, HTTP/1.0, upgrades."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from raw_client import get, post
from scripted_engine import chunk, json_reply

if TYPE_CHECKING:
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def test_connection_is_kept_alive(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """One connection serves request after request, relayed and local ones, and so does the engine's."""
    client = await gateway.connect()
    for _ in range(3):
        await client.send(post(CHAT))
        assert (await client.response()).status == 200
        await client.send(get("/healthz"))
        assert (await client.response()).json == {"status": "ok"}
    assert gateway.metric("headrace_client_connections") == 1
    assert [seen.connection for seen in scripted.requests] == [scripted.requests[0].connection] * 3


async def test_pipelined_requests_are_answered_in_order(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """Local, refused and relayed requests sent in one piece are answered one after the other."""
    client = await gateway.connect()
    await client.send(
        get("/healthz", x_request_id="1")
        + post(CHAT, x_request_id="2")
        + get("/nothing", x_request_id="3")
        + post({**CHAT, "stream": True}, x_request_id="4")
        + post({"model": "unknown"}, x_request_id="5")
        + post(CHAT, x_request_id="6")
        + get("/v1/models", x_request_id="7")
    )
    answers = [await client.response() for _ in range(7)]
    assert [answer.headers["x-request-id"] for answer in answers] == list("1234567")
    assert [answer.status for answer in answers] == [200, 200, 404, 200, 404, 200, 200]
    assert answers[3].body.endswith(b"data: [DONE]\n\n")
    assert len(scripted.requests) == 3


async def test_pipelined_request_waits_for_its_turn(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """The second of two pipelined requests is not sent before the first has been answered."""
    gate = asyncio.Event()
    scripted.scripts += [[gate, *json_reply({"number": 1})], json_reply({"number": 2})]
    client = await gateway.connect()
    await client.send(post(CHAT), post(CHAT))
    await eventually(lambda: scripted.counts.running == 1)
    assert len(scripted.requests) == 1
    gate.set()
    assert (await client.response()).json == {"number": 1}
    assert (await client.response()).json == {"number": 2}


async def test_more_pipelined_requests_than_are_read_ahead(gateway: Gateway) -> None:
    """Requests beyond the bound are read once the first have been answered: none is lost."""
    client = await gateway.connect()
    await client.send(b"".join(post(CHAT, x_request_id=str(number)) for number in range(300)))
    for number in range(300):
        assert (await client.response()).headers["x-request-id"] == str(number)


async def test_chunked_request_body(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """A chunked body, with an extension and a trailer, reaches the engine whole and sized."""
    client = await gateway.connect()
    await client.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
        b'9;x="y"\r\n{"model":\r\n',
        b'4\r\n"m"}\r\n0\r\nx-request-id: late\r\n\r\n',
    )
    answer = await client.response()
    assert answer.status == 200
    assert answer.headers["x-request-id"] == answer.headers["x-headrace-inference-id"]
    assert scripted.requests[0].body == b'{"model":"m"}'
    assert scripted.requests[0].headers["content-length"] == "13"


async def test_long_chunked_body_in_odd_pieces(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Only heads and trailers are held to the bound of a head, not what frames a long body."""
    part = b'"%b",' % (b"x" * 20_000)
    client = await gateway.connect()
    await client.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n",
        chunk(b'{"model":"m","x":['),
    )
    for _ in range(10):
        framed = chunk(part)
        await client.send(framed[:6], framed[6:])
    await client.send(chunk(b"1]}"), b"0\r\n", b"\r\n")
    assert (await client.response()).status == 200
    assert scripted.requests[0].body == b'{"model":"m","x":[' + 10 * part + b"1]}"


async def test_trailers_are_not_headers(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """What comes after a body cannot change a request that was admitted by its head."""
    client = await gateway.connect()
    await client.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
        b'd\r\n{"model":"m"}\r\n0\r\ntraceparent: 00-late\r\n\r\n'
    )
    assert (await client.response()).status == 200
    assert "traceparent" not in scripted.requests[0].headers


async def test_endless_trailers_are_bounded(gateway: Gateway) -> None:
    """Trailers count as head bytes: a client cannot make the gateway hold any number of them."""
    client = await gateway.connect()
    await client.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
        b'd\r\n{"model":"m"}\r\n0\r\n'
    )
    for number in range(40):
        await client.send(b"x-%d: %b\r\n" % (number, b"v" * 4096))
    answer = await client.response()
    assert (answer.status, answer.code) == (431, "headers_too_large")


async def test_expect_continue_is_answered_before_the_body(gateway: Gateway) -> None:
    """A client that asks whether to send its body is told to go on, then gets its answer."""
    client = await gateway.connect()
    request = post(CHAT, expect="100-Continue")
    head, _, body = request.partition(b"\r\n\r\n")
    await client.send(head + b"\r\n\r\n")
    assert (await client.response()).status == 100
    await client.send(body)
    assert (await client.response()).status == 200


async def test_expect_continue_is_refused_without_the_body(gateway: Gateway) -> None:
    """A request that its head condemns gets its final status at once and no 100."""
    client = await gateway.connect()
    await client.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\n"
        b"content-length: 999999999\r\n\r\n"
    )
    answer = await client.response()
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert answer.headers["connection"] == "close"
    assert await client.rest() == b""


async def test_expect_continue_to_http10_is_ignored(gateway: Gateway) -> None:
    """HTTP/1.0 has no interim responses."""
    client = await gateway.connect()
    request = post(CHAT, expect="100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")
    await client.send(request)
    assert (await client.response()).status == 200


async def test_expect_continue_behind_a_running_request(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """A pipelined request that expects a 100 gets it once it is its turn."""
    gate = asyncio.Event()
    scripted.scripts.append([gate, *json_reply({"number": 1})])
    client = await gateway.connect()
    head, _, body = post(CHAT, expect="100-continue").partition(b"\r\n\r\n")
    await client.send(post(CHAT), head + b"\r\n\r\n")
    await eventually(lambda: scripted.counts.running == 1)
    gate.set()
    assert (await client.response()).json == {"number": 1}
    assert (await client.response()).status == 100
    await client.send(body)
    assert (await client.response()).status == 200


@pytest.mark.parametrize(
    "target", ["/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/m"]
)
async def test_head_of_local_routes(gateway: Gateway, target: str) -> None:
    """HEAD gets the head of the GET, length included, and no body; the connection goes on."""
    client = await gateway.connect()
    await client.send(get(target).replace(b"GET", b"HEAD"), get("/healthz"))
    answer = await client.response(is_head=True)
    assert answer.status == 200
    assert int(answer.headers["content-length"]) > 0
    assert (await client.response()).json == {"status": "ok"}


async def test_head_of_a_relayed_route(gateway: Gateway) -> None:
    """HEAD is not allowed there; that answer has no body either."""
    client = await gateway.connect()
    await client.send(b"HEAD /v1/completions HTTP/1.1\r\nhost: h\r\n\r\n", get("/healthz"))
    answer = await client.response(is_head=True)
    assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")
    assert (await client.response()).status == 200


async def test_options(gateway: Gateway) -> None:
    """OPTIONS says what a route takes, and of `*` what the server does."""
    client = await gateway.connect()
    for target, allowed in (
        ("*", "GET, HEAD, POST, OPTIONS"),
        ("/v1/completions", "POST, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
    ):
        await client.send(f"OPTIONS {target} HTTP/1.1\r\nhost: h\r\n\r\n".encode())
        answer = await client.response()
        assert (answer.status, answer.headers["allow"]) == (204, allowed)


async def test_http10_stream_ends_with_the_connection(gateway: Gateway) -> None:
    """HTTP/1.0 knows no chunks: the body is plain and ends with the connection."""
    client = await gateway.connect()
    request = post({**CHAT, "stream": True}, connection="keep-alive")
    await client.send(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
    answer = await client.response()
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    assert answer.body.startswith(b"data: {")
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_http10_sized_body(gateway: Gateway) -> None:
    """With `Connection: keep-alive` an HTTP/1.0 connection goes on, without it is closed."""
    client = await gateway.connect()
    kept = post(CHAT, connection="keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
    await client.send(kept)
    assert (await client.response()).headers["connection"] == "keep-alive"
    await client.send(post(CHAT).replace(b"HTTP/1.1", b"HTTP/1.0"))
    answer = await client.response()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.rest() == b""


async def test_http10_gets_an_unsized_json_body_plain(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """A chunked body of the engine is dechunked for HTTP/1.0."""
    scripted.scripts.append(json_reply({"a": 1}, framing="chunked"))
    client = await gateway.connect()
    await client.send(post(CHAT).replace(b"HTTP/1.1", b"HTTP/1.0"))
    answer = await client.response()
    assert "transfer-encoding" not in answer.headers
    assert answer.json == {"a": 1}


async def test_connection_close(gateway: Gateway) -> None:
    """The last answer says so and the connection ends."""
    client = await gateway.connect()
    await client.send(post(CHAT, connection="close"))
    answer = await client.response()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.rest() == b""


async def test_absolute_form(gateway: Gateway) -> None:
    """A target in absolute form names the same route (RFC 9112, section 3.2.2)."""
    assert (await gateway.ask(get("http://any.host:80/healthz?x=1"))).json == {"status": "ok"}
    assert (await gateway.post(CHAT, "http://any.host/v1/chat/completions")).status == 200


async def test_upgrade_offer_is_ignored(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """An offer of HTTP/2 is passed over: the body is read and the answer is HTTP/1.1."""
    client = await gateway.connect()
    request = post(
        CHAT, upgrade="h2c", connection="Upgrade, HTTP2-Settings", http2_settings="AAMAAABk"
    )
    await client.send(request, request[:40], request[40:])
    assert (await client.response()).status == 200
    assert (await client.response()).status == 200
    assert scripted.requests[1].json == CHAT


async def test_upgrade_offer_with_close(gateway: Gateway) -> None:
    """`Connection: close` beside an offer is still obeyed."""
    client = await gateway.connect()
    await client.send(post(CHAT, upgrade="h2c", connection="close, Upgrade"))
    answer = await client.response()
    assert (answer.status, answer.headers.get("connection")) == (200, "close")


async def test_upgrade_offer_on_a_refused_request(gateway: Gateway) -> None:
    """The refusal is the request's own."""
    answer = await gateway.ask(post(CHAT, "/sleep", upgrade="h2c", connection="Upgrade"))
    assert (answer.status, answer.code) == (404, "unknown_url")


async def test_headers_with_empty_values(gateway: Gateway) -> None:
    """Empty values are values: an empty request id is replaced by ours."""
    answer = await gateway.ask(
        b"GET /v1/models HTTP/1.1\r\nhost:\r\nx-request-id: \r\nx-a:\r\n\r\n"
    )
    assert answer.status == 200
    assert answer.headers["x-request-id"] == answer.headers["x-headrace-inference-id"]


async def test_head_in_single_bytes(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Target and headers split across reads are put together."""
    client = await gateway.connect()
    request = post(CHAT, x_request_id="one-by-one")
    await client.send(*(request[at : at + 1] for at in range(len(request))))
    answer = await client.response()
    assert (answer.status, answer.headers["x-request-id"]) == (200, "one-by-one")
    assert scripted.requests[0].json == CHAT


async def test_connections_are_bounded(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """One connection too many is told so and closed; the others go on."""
    gateway = await start_gateway(scripted, limits={"max_connections": 2})
    first, second, third = [await gateway.connect() for _ in range(3)]
    answer = await third.response()
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "overloaded", "1")
    assert await third.rest() == b""
    for client in (first, second):
        await client.send(post(CHAT))
        assert (await client.response()).status == 200
