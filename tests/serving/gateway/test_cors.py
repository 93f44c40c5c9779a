"""CORS: off unless configured; which origins get which headers, on every kind of response."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Protocol

import pytest
from raw_client import get, post
from running_gateway import NO_CANARY, key_hash, running
from scripted_engine import Act, head

from serving.config import Cors, GatewayConfig, Listen, ReplicaConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from raw_client import Response
    from running_gateway import Gateway
    from scripted_engine import ScriptedEngine

PAGE = "https://chat.example.com"
CHAT = {"model": "m", "messages": []}
PATH = "/v1/chat/completions"
EXPOSED = "x-request-id, x-headrace-inference-id, retry-after"


class StartWith(Protocol):
    """Starts a gateway with these rules and keys."""

    async def __call__(self, cors: Cors | None, *keys: str) -> Gateway: ...


@pytest.fixture
async def start_with(scripted: ScriptedEngine, tmp_path: Path) -> AsyncIterator[StartWith]:
    """A gateway before one engine."""
    async with AsyncExitStack() as stack:

        async def start(cors: Cors | None, *keys: str) -> Gateway:
            config = GatewayConfig(
                listen=Listen(host="127.0.0.1", port=0),
                replicas=(ReplicaConfig.parse(f"vllm={scripted.url}"),),
                api_keys=tuple(key_hash(key) for key in keys),
                cors=cors,
                resilience=NO_CANARY,
            )
            return await stack.enter_async_context(running(config, tmp_path, scripted))

        yield start


def _options(path: str, **headers: str) -> bytes:
    return get(path, **headers).replace(b"GET ", b"OPTIONS ", 1)


def _preflight(origin: str = PAGE, headers: str = "authorization,content-type") -> bytes:
    return _options(
        PATH,
        origin=origin,
        access_control_request_method="POST",
        access_control_request_headers=headers,
    )


def _cors_headers(answer: Response) -> dict[str, str]:
    return {
        name: value
        for name, value in answer.headers.items()
        if name.startswith("access-control-") or name == "vary"
    }


async def test_off(start_with: StartWith) -> None:
    """Nothing is said about origins, and a preflight is an OPTIONS like any other: it needs a key."""
    gateway = await start_with(None, "k")
    assert (await gateway.ask(_preflight())).status == 401
    answer = await gateway.ask(_options(PATH, origin=PAGE, x_api_key="k"))
    assert (answer.status, answer.headers["allow"]) == (204, "POST, OPTIONS")
    assert _cors_headers(answer) == {}
    answer = await gateway.ask(get("/healthz", origin=PAGE))
    assert _cors_headers(answer) == {}


async def test_preflight(start_with: StartWith) -> None:
    """Answered without a key, with what was asked for; the connection goes on."""
    gateway = await start_with(Cors(allowed_origins=(PAGE,)), "k")
    client = await gateway.connect()
    await client.send(_preflight(), get("/healthz"))
    answer = await client.response()
    assert answer.status == 204
    assert "content-length" not in answer.headers
    assert _cors_headers(answer) == {
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization,content-type",
        "access-control-max-age": "600",
        "access-control-expose-headers": EXPOSED,
        "vary": "origin",
    }
    assert (await client.response()).status == 200


async def test_other_origins(start_with: StartWith) -> None:
    """An origin that is not allowed is told nothing; `vary` keeps caches from mixing them up."""
    gateway = await start_with(Cors(allowed_origins=(PAGE,)), "k")
    for origin in (
        "https://evil.example",
        f"{PAGE}.evil.example",
        "http://chat.example.com",
        "null",
    ):
        answer = await gateway.ask(_preflight(origin))
        assert (answer.status, _cors_headers(answer)) == (204, {"vary": "origin"})
        answer = await gateway.ask(get("/healthz", origin=origin))
        assert (answer.status, _cors_headers(answer)) == (200, {"vary": "origin"})


async def test_preflight_does_not_open_routes(start_with: StartWith) -> None:
    """What follows a preflight still needs a key; unknown routes stay unknown."""
    gateway = await start_with(Cors(allowed_origins=(PAGE,)), "k")
    answer = await gateway.post(CHAT, origin=PAGE)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, PAGE)
    answer = await gateway.ask(_preflight().replace(PATH.encode(), b"/sleep"))
    assert (answer.status, answer.code) == (404, "unknown_url")


@pytest.mark.parametrize("bad", ["a: b", "x-a,", "a\x0bb", "(comment)"])
async def test_asked_headers_are_names(start_with: StartWith, bad: str) -> None:
    """What a client sends is only given back if it is a list of names."""
    gateway = await start_with(Cors(allowed_origins=(PAGE,)))
    answer = await gateway.ask(_preflight(headers=bad))
    assert "access-control-allow-headers" not in answer.headers


async def test_named_headers_and_credentials(start_with: StartWith) -> None:
    """Named headers are listed whatever was asked; credentials only where configured."""
    cors = Cors(
        allowed_origins=("https://other.example", PAGE),
        allowed_headers=("authorization",),
        exposed_headers=(),
        max_age_s=5,
        allow_credentials=True,
    )
    gateway = await start_with(cors)
    answer = await gateway.ask(_preflight(headers="x-else"))
    assert _cors_headers(answer) == {
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization",
        "access-control-allow-credentials": "true",
        "access-control-max-age": "5",
        "vary": "origin",
    }


async def test_every_kind_of_response(start_with: StartWith, scripted: ScriptedEngine) -> None:
    """Bodies, streams, errors of ours and of the engine, and what breaks: all can be read."""
    gateway = await start_with(Cors(allowed_origins=("*",)))
    expected = {
        "access-control-allow-origin": "*",
        "access-control-expose-headers": EXPOSED,
        "vary": "origin",
    }
    answers = [
        await gateway.post(CHAT, origin=PAGE),
        await gateway.post({**CHAT, "stream": True}, origin=PAGE),
        await gateway.post({"model": "none"}, origin=PAGE),
        await gateway.post(b"{", origin=PAGE),
        await gateway.ask(get("/nowhere", origin=PAGE)),
        await gateway.ask(get("/v1/models/none", origin=PAGE)),
        await gateway.ask(get("/metrics", origin=PAGE)),
        await gateway.ask(get(PATH, origin=PAGE)),
    ]
    scripted.always = [head(500, "content-length: 0")]
    answers.append(await gateway.post(CHAT, origin=PAGE))
    scripted.always = [Act.RESET]
    answers.append(await gateway.post(CHAT, origin=PAGE))
    assert [answer.status for answer in answers] == [
        *(200, 200, 404, 400, 404, 404, 200, 405, 502, 502)
    ]
    assert [_cors_headers(answer) for answer in answers] == [expected] * len(answers)


async def test_options(start_with: StartWith) -> None:
    """OPTIONS says what a route takes; of the server as a whole without a key."""
    gateway = await start_with(None, "k")
    for path, allow in (
        (PATH, "POST, OPTIONS"),
        ("/healthz", "GET, HEAD, OPTIONS"),
        ("/v1/models/m", "GET, HEAD, OPTIONS"),
        ("*", "GET, HEAD, POST, OPTIONS"),
    ):
        key = {} if path in ("*", "/healthz") else {"x_api_key": "k"}
        answer = await gateway.ask(_options(path, **key))
        assert (answer.status, answer.headers["allow"], answer.body) == (204, allow, b"")
    answer = await gateway.ask(_options("/nowhere", x_api_key="k"))
    assert (answer.status, answer.code) == (404, "unknown_url")
    client = await gateway.connect()
    await client.send(_options("*").replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert (await client.response()).headers["connection"] == "close"
    assert await client.rest() == b""


async def test_options_with_a_body(start_with: StartWith) -> None:
    """Its body is read and dropped; the next request is the next one."""
    gateway = await start_with(None)
    client = await gateway.connect()
    await client.send(post(b"x" * 100).replace(b"POST ", b"OPTIONS ", 1), get("/healthz"))
    assert [(await client.response()).status for _ in range(2)] == [204, 200]
