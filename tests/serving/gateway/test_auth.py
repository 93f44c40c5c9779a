"""API keys at the door."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from raw_client import get, post
from running_gateway import key_hash

from serving.errors import Unauthenticated
from serving.gateway.auth import ApiKeys

if TYPE_CHECKING:
    from running_gateway import StartGateway
    from scripted_engine import ScriptedEngine

KEYS = ApiKeys([key_hash("hr-one"), key_hash("hr-two")])
CHAT = {"model": "m", "messages": []}


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({b"authorization": b"Bearer hr-one"}, "hr-one"),
        ({b"authorization": b"bearer hr-two"}, "hr-two"),
        ({b"authorization": b"BEARER   hr-two  "}, "hr-two"),
        ({b"x-api-key": b"hr-one"}, "hr-one"),
        ({b"authorization": b"Basic aaa", b"x-api-key": b"hr-one"}, "hr-one"),
    ],
)
def test_known_key(headers: dict[bytes, bytes], name: str) -> None:
    """A known key lets in, by either header and whatever the case of the scheme."""
    known = KEYS.check(headers)
    assert known is not None
    assert (known.name, known.is_admin) == (name, False)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b""},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer "},
        {b"authorization": b"hr-one"},
        {b"authorization": b"Basic hr-one"},
        {b"authorization": b"Bearer hr-on"},
        {b"authorization": b"Bearer hr-one x"},
        {b"authorization": b"Bearer HR-ONE"},
        {b"authorization": b"Bearer \xff\xfe"},
        {b"authorization": b"Bearer " + key_hash("hr-one").sha256_hex.encode()},
        {b"authorization": b"Bearer wrong", b"x-api-key": b"hr-one"},
        {b"x-api-key": b""},
    ],
)
def test_unknown_key(headers: dict[bytes, bytes]) -> None:
    """Anything else is refused; the hash of a key is no key."""
    with pytest.raises(Unauthenticated):
        KEYS.check(headers)


def test_no_keys_let_everybody_in() -> None:
    """Without keys nothing is asked for."""
    assert ApiKeys([]).check({}) is None


@pytest.mark.parametrize("target", ["/healthz", "/readyz", "/metrics"])
async def test_open_routes(
    scripted: ScriptedEngine, start_gateway: StartGateway, target: str
) -> None:
    """Probes and scrapers have no key."""
    gateway = await start_gateway(scripted, keys=("hr-one",))
    assert (await gateway.ask(get(target))).status == 200


@pytest.mark.parametrize(
    "target", ["/v1/models", "/v1/models/m", "/nothing", "//healthz", "/healthz/"]
)
async def test_closed_routes(
    scripted: ScriptedEngine, start_gateway: StartGateway, target: str
) -> None:
    """Everything else has to know one, unknown paths included."""
    gateway = await start_gateway(scripted, keys=("hr-one",))
    answer = await gateway.ask(get(target))
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert (await gateway.ask(get(target, authorization="Bearer hr-one"))).status in (200, 404)


async def test_refused_before_the_body(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """The body of a request with a wrong key is neither waited for nor held."""
    gateway = await start_gateway(scripted, keys=("hr-one",))
    client = await gateway.connect()
    await client.send(
        b"POST /v1/completions HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\n"
        b"content-length: 100000\r\nauthorization: Bearer x\r\n\r\n"
    )
    answer = await client.response()
    assert (answer.status, answer.headers["connection"]) == (401, "close")
    assert await client.rest() == b""


async def test_anthropic_client(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """`x-api-key` is Anthropic's header; its refusal has Anthropic's shape."""
    gateway = await start_gateway(scripted, keys=("hr-one",))
    assert (await gateway.ask(post(CHAT, "/v1/messages", x_api_key="hr-one"))).status == 200
    answer = await gateway.ask(post(CHAT, "/v1/messages", x_api_key="hr-two"))
    assert answer.status == 401
    assert answer.json["error"]["type"] == "authentication_error"
    await eventually(lambda: gateway.metric("headrace_requests_total", code="401") == 1)
