"""A table of bad inputs: each gets the right status and code, and the server survives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
from raw_client import get, post

if TYPE_CHECKING:
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine

CHAT = b'{"model":"m","messages":[]}'
KEY = "hr-right"
PATH = b"/v1/chat/completions"
LIMITS = {"max_head_bytes": 4096, "max_target_bytes": 512, "max_body_bytes": 8192}


class Case(NamedTuple):
    """Bytes to send, and what has to come back."""

    name: str
    raw: bytes
    status: int
    code: str | None
    is_kept: bool = False


def _raw(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((b"POST " + PATH + b" HTTP/1.1", b"host: h", *lines)) + b"\r\n\r\n" + body


def _authorized(body: bytes) -> bytes:
    return post(body, authorization=f"Bearer {KEY}")


def _body(name: str, body: bytes, status: int = 400, code: str | None = None) -> Case:
    """A well-framed request whose body is at fault: the connection goes on."""
    return Case(name, _authorized(body), status, code, is_kept=True)


_AUTH = f"authorization: Bearer {KEY}".encode()
_CHUNKED = b"transfer-encoding: chunked"
_MALFORMED = (400, "malformed_http")

CASES = [
    Case("not HTTP", b"hello\r\n\r\n", *_MALFORMED),
    Case("unknown method", b"BREW /healthz HTTP/1.1\r\nhost: h\r\n\r\n", *_MALFORMED),
    Case("lower-case method", b"get /healthz HTTP/1.1\r\nhost: h\r\n\r\n", *_MALFORMED),
    Case("no version", b"GET /healthz\r\n\r\n", *_MALFORMED),
    Case("HTTP/0.9", b"GET /healthz HTTP/0.9\r\n\r\n", *_MALFORMED),
    Case("HTTP/2.0", b"GET /healthz HTTP/2.0\r\nhost: h\r\n\r\n", *_MALFORMED),
    Case("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", *_MALFORMED),
    Case("odd version", b"GET /healthz HTTP/1.7\r\nhost: h\r\n\r\n", *_MALFORMED),
    Case("no target", b"GET  HTTP/1.1\r\nhost: h\r\n\r\n", *_MALFORMED),
    Case("space in target", b"GET /a b HTTP/1.1\r\nhost: h\r\n\r\n", *_MALFORMED),
    Case("raw UTF-8 in target", "GET /é HTTP/1.1\r\nhost: h\r\n\r\n".encode(), *_MALFORMED),
    Case("NUL in target", b"GET /\0 HTTP/1.1\r\nhost: h\r\n\r\n", *_MALFORMED),
    Case("NUL bytes", b"\0" * 64, *_MALFORMED),
    Case("TLS hello", bytes.fromhex("16030100c8010000c40303") + b"\x42" * 64, *_MALFORMED),
    Case("CONNECT", b"CONNECT engine:80 HTTP/1.1\r\nhost: h\r\n\r\n", *_MALFORMED),
    Case("no colon in header", _raw(b"nonsense"), *_MALFORMED),
    Case("space before colon", _raw(b"x : y"), *_MALFORMED),
    Case("folded header", _raw(b"x-request-id: a", b" b"), *_MALFORMED),
    Case("NUL in header", _raw(b"x-request-id: a\0b"), *_MALFORMED),
    Case("bare LF in header", _raw(b"x-request-id: a\nb: c"), *_MALFORMED),
    Case("bare CR in header", _raw(b"x-request-id: a\rb: c"), *_MALFORMED),
    Case("bad chunk size", _raw(_AUTH, _CHUNKED, body=b"zz\r\n"), *_MALFORMED),
    Case("huge chunk size", _raw(_AUTH, _CHUNKED, body=b"f" * 17 + b"\r\n"), *_MALFORMED),
    Case("chunk too long", _raw(_AUTH, _CHUNKED, body=b"1\r\nab\r\n0\r\n\r\n"), *_MALFORMED),
    Case("length and chunked", _raw(_AUTH, b"content-length: 3", _CHUNKED), *_MALFORMED),
    Case("chunked and length", _raw(_AUTH, _CHUNKED, b"content-length: 3"), *_MALFORMED),
    Case("two lengths", _raw(_AUTH, b"content-length: 3", b"content-length: 4"), *_MALFORMED),
    Case("list of lengths", _raw(_AUTH, b"content-length: 3, 3"), *_MALFORMED),
    Case("negative length", _raw(_AUTH, b"content-length: -1"), *_MALFORMED),
    Case("signed length", _raw(_AUTH, b"content-length: +1"), *_MALFORMED),
    Case("hexadecimal length", _raw(_AUTH, b"content-length: 0x10"), *_MALFORMED),
    Case("length past 64 bits", _raw(_AUTH, b"content-length: " + b"9" * 30), *_MALFORMED),
    Case("empty length", _raw(_AUTH, b"content-length:"), *_MALFORMED),
    Case("not chunked last", _raw(_AUTH, b"transfer-encoding: chunked, gzip"), *_MALFORMED),
    Case("identity", _raw(_AUTH, b"transfer-encoding: identity"), *_MALFORMED),
    Case("huge length", _raw(_AUTH, b"content-length: 99999999999"), 413, "request_too_large"),
    Case(
        "long body",
        _raw(_AUTH, b"content-length: 8193", body=b"x" * 8193),
        413,
        "request_too_large",
        is_kept=True,
    ),
    Case(
        "long chunked body",
        _raw(
            _AUTH, _CHUNKED, body=b"10000\r\n" + b"x" * 65536 + b"\r\n" + b"10000\r\n" + b"x" * 99
        ),
        413,
        "request_too_large",
    ),
    Case("long target", get("/" + "a" * 512), 414, "uri_too_long", is_kept=True),
    Case("very long target", get("/" + "a" * 9000), 414, "uri_too_long", is_kept=True),
    Case("endless target", b"GET /" + b"a" * 9000, 431, "headers_too_large"),
    Case("large header", get("/healthz", x="v" * 4096), 431, "headers_too_large", is_kept=True),
    Case("endless header", b"GET /healthz HTTP/1.1\r\nx: " + b"v" * 9000, 431, "headers_too_large"),
    Case(
        "many headers",
        _raw(*[b"x%d: y" % n for n in range(900)]),
        431,
        "headers_too_large",
        is_kept=True,
    ),
    Case("no key", post(CHAT), 401, "invalid_api_key", is_kept=True),
    Case(
        "wrong key",
        post(CHAT, authorization="Bearer hr-wrong"),
        401,
        "invalid_api_key",
        is_kept=True,
    ),
    Case("no key for an unknown path", get("/sleep"), 401, "invalid_api_key", is_kept=True),
    Case("unknown path", get("/sleep", x_api_key=KEY), 404, "unknown_url", is_kept=True),
    Case(
        "wrong method", get(PATH.decode(), x_api_key=KEY), 405, "method_not_supported", is_kept=True
    ),
    Case("POST of a local route", post(b"", "/healthz"), 405, "method_not_supported", is_kept=True),
    _body("empty body", b""),
    _body("bad JSON", b'{"model":'),
    _body("two JSON values", b"{} {}"),
    _body("JSON array", b"[]"),
    _body("JSON string", b'"m"'),
    _body("JSON null", b"null"),
    _body("not a JSON number", b'{"model":"m","temperature":NaN}'),
    _body("NUL bytes in JSON", b'{"model":"m"\0}'),
    _body("byte order mark", b"\xef\xbb\xbf" + CHAT),
    _body("deep nesting", b'{"model":"m","x":' + b"[" * 4000 + b"]" * 4000 + b"}"),
    _body("invalid UTF-8 in model", b'{"model":"\xff"}'),
    _body("lone surrogate in model", b'{"model":"\\ud800"}'),
    _body("invalid UTF-8 in a key", b'{"model":"m","\xff":1,"stream":true}'),
    _body("missing model", b"{}"),
    _body("null model", b'{"model":null}'),
    _body("number as model", b'{"model":5}'),
    _body("string as stream", b'{"model":"m","stream":"yes"}'),
    _body("string as max_tokens", b'{"model":"m","max_tokens":"5"}'),
    _body("array as stream_options", b'{"model":"m","stream_options":[]}'),
    _body("unknown model", b'{"model":"gpt-9"}', 404, "model_not_found"),
    _body("model with NUL", b'{"model":"m\\u0000"}', 404, "model_not_found"),
    _body("empty model", b'{"model":""}', 404, "model_not_found"),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_bad_input(case: Case, scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """The status, the code, no word with the engine, a connection kept or closed; then all is well."""
    gateway = await start_gateway(scripted, keys=(KEY,), limits=LIMITS)
    client = await gateway.connect()
    await client.send(case.raw)
    answer = await client.response()
    assert (answer.status, answer.code) == (case.status, case.code), answer.body
    assert answer.json["error"]["message"]
    assert answer.headers["content-type"] == "application/json"
    assert scripted.requests == []
    if case.is_kept:
        await client.send(_authorized(CHAT))
        assert (await client.response()).status == 200
    else:
        assert answer.headers["connection"] == "close"
        assert await client.rest() == b""
    assert (await gateway.ask(_authorized(CHAT))).status == 200


async def test_wrong_types_name_their_field(gateway: Gateway) -> None:
    """`param` says which field is at fault."""
    answer = await gateway.post({"model": "m", "stream_options": {"include_usage": "yes"}})
    assert answer.json["error"]["param"] == "stream_options.include_usage"
    answer = await gateway.post({"model": "m", "n": "two"})
    assert answer.json["error"]["param"] == "n"
    assert answer.json["error"]["type"] == "invalid_request_error"


async def test_anthropic_route_answers_in_anthropic_shape(gateway: Gateway) -> None:
    """Errors of /v1/messages have the body that Anthropic's clients know, with the request id."""
    answer = await gateway.post({"model": "x"}, "/v1/messages", x_request_id="r1")
    assert answer.status == 404
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "not_found_error"
    assert answer.json["request_id"] == "r1"


async def test_refused_body_is_drained(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """A small body of a refused request is read, and the next request on the connection is answered."""
    gateway = await start_gateway(scripted, keys=(KEY,))
    client = await gateway.connect()
    await client.send(post(b"x" * 60_000), _authorized(CHAT))
    assert [(await client.response()).status for _ in range(2)] == [401, 200]


async def test_large_refused_body_is_not_read(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """A wrong key is answered before a large body has been sent, and the connection ends."""
    gateway = await start_gateway(scripted, keys=(KEY,))
    client = await gateway.connect()
    await client.send(
        _raw(b"content-length: 1000000", b"authorization: Bearer x", body=b"x" * 1000)
    )
    answer = await client.response()
    assert (answer.status, answer.headers["connection"]) == (401, "close")
