"""Failures of replicas: what is tried again, how often, and what the client is told."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from raw_client import post
from scripted_engine import (
    STREAM_HEAD,
    Act,
    chunk,
    error_body,
    event,
    head,
    json_reply,
    stream_reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine, StartEngine, Step

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}
EVENT = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})


async def _fleet(
    start_engine: StartEngine, start_gateway: StartGateway, size: int
) -> tuple[Gateway, list[ScriptedEngine]]:
    engines = [await start_engine() for _ in range(size)]
    return await start_gateway(*engines), engines


def _sent(engines: Sequence[ScriptedEngine]) -> list[int]:
    return [len(engine.requests) for engine in engines]


async def test_refused_connection_goes_elsewhere(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """Requests go to the replica that takes connections, and the other is taken out at once."""
    gateway, engines = await _fleet(start_engine, start_gateway, 2)
    engines[0].die()
    for _ in range(4):
        assert (await gateway.post(CHAT)).status == 200
    assert _sent(engines) == [0, 4]
    assert gateway.worker.snapshot.replica_health[f"127.0.0.1:{engines[0].port}"] is False
    assert gateway.metric("headrace_retries_total") == 1


async def test_replica_comes_back(start_engine: StartEngine, start_gateway: StartGateway) -> None:
    """A replica that listens again gets requests again."""
    gateway, engines = await _fleet(start_engine, start_gateway, 1)
    engines[0].die()
    assert (await gateway.post(CHAT)).status == 503
    await engines[0].listen()
    await eventually(lambda: gateway.worker.snapshot.is_ready)
    assert (await gateway.post(CHAT)).status == 200


@pytest.mark.parametrize(
    "script",
    [
        [Act.RESET],
        [Act.FIN],
        [b"HTTP/1.1 2", Act.FIN],
        [STREAM_HEAD, Act.RESET],
        [STREAM_HEAD, Act.FIN],
        [b"SSH-2.0-OpenSSH_9.2\r\n"],
        [b"\x15\x03\x01\x00\x02\x02\x16", Act.FIN],
        [head(101, "upgrade: x", "connection: upgrade")],
        [b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, Act.HANG],
        json_reply(error_body("boom", "InternalServerError", 500), status=500),
        json_reply(b"<html>", status=502, framing="closed"),
        json_reply({"error": "Unauthorized"}, status=401),
        [head(302, "location: /x", "content-length: 0")],
    ],
    ids=[
        "reset", "closed", "part of a head", "head then reset", "head then closed", "not HTTP",
        "TLS alert", "upgrade", "endless head", "500", "502", "401", "302",
    ],
)  # fmt: skip
async def test_failure_before_the_first_byte(
    start_engine: StartEngine, start_gateway: StartGateway, script: Sequence[Step]
) -> None:
    """Tried once more on another replica; when that fails as well, the client is told."""
    gateway, engines = await _fleet(start_engine, start_gateway, 3)
    # Whichever replica is asked next takes the next of these.
    scripts = deque([script])
    for engine in engines:
        engine.scripts = scripts
    assert (await gateway.post(STREAM)).status == 200
    assert sorted(_sent(engines)) == [0, 1, 1]
    assert gateway.metric("headrace_retries_total") == 1
    scripts.extend([script, script])
    answer = await gateway.post(STREAM)
    assert answer.status in (502, 503)
    assert answer.json["error"]["type"] == "server_error"
    assert sum(_sent(engines)) == 4
    assert gateway.metric("headrace_errors_total") == 1


async def test_full_queues(start_engine: StartEngine, start_gateway: StartGateway) -> None:
    """Who refuses a request unread does not use up its second sending: the third replica gets it."""
    gateway, engines = await _fleet(start_engine, start_gateway, 3)
    full = json_reply(error_body("queue", "Service Unavailable", 503), status=503)
    scripts = deque([full, full])
    for engine in engines:
        engine.scripts = scripts
    assert (await gateway.post(STREAM)).status == 200
    assert _sent(engines) == [1, 1, 1]
    scripts.extend([full, full, full])
    answer = await gateway.post(STREAM)
    assert (answer.status, answer.json["error"]["code"]) == (503, "overloaded")
    assert sum(_sent(engines)) == 6


@pytest.mark.parametrize("busy", [0, 1])
async def test_full_and_unreachable(
    start_engine: StartEngine, start_gateway: StartGateway, busy: int
) -> None:
    """That one is full says more than that the other cannot be reached, whichever was tried first."""
    gateway, (full, dead) = await _fleet(start_engine, start_gateway, 2)
    full.always = json_reply(error_body("queue", "Service Unavailable", 503), status=503)
    dead.die()
    gateway.worker.ledger.charge(busy, 1000)
    answer = await gateway.post(CHAT)
    gateway.worker.ledger.settle(busy, 1000)
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "overloaded", "1")
    assert _sent([full, dead]) == [1, 0]
    assert gateway.metric("headrace_retries_total") == 1


@pytest.mark.parametrize(
    ("status", "code", "ours", "retry_after"),
    [(500, "upstream_error", 502, None), (503, "overloaded", 503, "1")],
)
async def test_status_of_a_failing_fleet(
    gateway: Gateway,
    scripted: ScriptedEngine,
    status: int,
    code: str,
    ours: int,
    retry_after: str | None,
) -> None:
    """An engine that fails is a 502, one that is full a 503 with `Retry-After`."""
    scripted.scripts.append(json_reply(error_body("x", "X", status), status=status))
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.code, answer.headers.get("retry-after")) == (
        ours,
        code,
        retry_after,
    )


async def test_no_replica(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """With every replica of a model down the answer is 503 with `Retry-After`, and readiness ends."""
    scripted.die()
    for _ in range(2):
        answer = await gateway.post(CHAT)
        assert (answer.status, answer.code) == (503, "no_replica_available")
        assert answer.headers["retry-after"] == "2"
    ready = await gateway.ask(b"GET /readyz HTTP/1.1\r\nhost: h\r\n\r\n")
    assert (ready.status, ready.json["status"]) == (503, "waiting")
    assert gateway.metric("headrace_requests_total", code="503") == 2
    assert gateway.metric("headrace_retries_total") == 0


async def test_stale_connection_is_replaced(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """A kept connection that closes under a request is no failure: same replica, new connection."""
    gateway, engines = await _fleet(start_engine, start_gateway, 1)
    assert (await gateway.post(CHAT)).status == 200
    engines[0].scripts.append([Act.RESET])
    assert (await gateway.post(CHAT)).status == 200
    assert [seen.connection for seen in engines[0].requests[1:]] == [
        engines[0].requests[0].connection,
        engines[0].counts.connections,
    ]
    assert gateway.metric("headrace_errors_total") == 0
    assert gateway.metric("headrace_retries_total") == 0


async def test_idle_connection_closed_by_the_engine_is_not_used(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """A close that has arrived before the request costs nothing."""
    assert (await gateway.post(CHAT)).status == 200
    scripted.close_connections()
    await eventually(lambda: scripted.counts.open_connections == 0)
    assert (await gateway.post(CHAT)).status == 200
    assert len(scripted.requests) == 2


async def test_poison_is_sent_twice_at_most(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """A request that kills every engine it meets does not meet a third one."""
    gateway, engines = await _fleet(start_engine, start_gateway, 3)
    for engine in engines:
        engine.always = [Act.RESET]
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.code) == (502, "upstream_error")
    assert sum(_sent(engines)) == 2


async def test_poison_on_kept_connections_is_sent_twice_at_most(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """Nor where each death looks like a connection that went stale."""
    gateway, engines = await _fleet(start_engine, start_gateway, 3)
    gate = asyncio.Event()
    for engine in engines:
        engine.scripts.append([gate, *json_reply({})])
    clients = [await gateway.connect() for _ in engines]
    for client in clients:
        await client.send(post(CHAT))
    await eventually(lambda: _sent(engines) == [1, 1, 1])
    gate.set()
    for client in clients:
        assert (await client.response()).status == 200
    for engine in engines:
        engine.refuse()
        engine.always = [Act.RESET]
    answer = await gateway.post(CHAT)
    assert answer.status == 502
    assert sum(_sent(engines)) == 3 + 2


async def test_closed_right_after_accept(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """A replica that accepts and closes is not waited for."""
    gateway, engines = await _fleet(start_engine, start_gateway, 2)
    for act in (Act.RESET, Act.FIN):
        engines[0].connection_script = act
        engines[0].close_connections()
        for _ in range(4):
            assert (await gateway.post(CHAT)).status == 200
    assert _sent(engines) == [0, 8]
    assert gateway.metric("headrace_errors_total") == 0


async def test_attempts_are_bounded(start_engine: StartEngine, start_gateway: StartGateway) -> None:
    """Refused connections count as attempts: two replicas are tried here, not four."""
    engines = [await start_engine() for _ in range(4)]
    gateway = await start_gateway(*engines, limits={"max_attempts": 2})
    for engine in engines:
        engine.die()
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.code) == (503, "no_replica_available")
    assert sum(gateway.worker.snapshot.replica_health.values()) == 2


@pytest.mark.parametrize(
    ("path", "shape"), [("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic")]
)
@pytest.mark.parametrize("act", [Act.RESET, Act.FIN])
async def test_death_in_mid_stream(
    gateway: Gateway, scripted: ScriptedEngine, path: str, shape: str, act: Act
) -> None:
    """The client gets what came, one error event in its API's shape, the last chunk, and the end."""
    scripted.scripts.append([STREAM_HEAD, chunk(EVENT), chunk(EVENT), act])
    client = await gateway.connect()
    await client.send(post(STREAM, path))
    answer = await client.response()
    assert answer.status == 200
    assert answer.chunks[:2] == [EVENT, EVENT]
    assert len(answer.chunks) == 3
    name, _, text = answer.chunks[2].rpartition(b"data: ")
    error = json.loads(text)
    assert (
        error["error"]["message"]
        == "The engine closed the connection in the middle of its response."
    )
    if shape == "anthropic":
        assert (name, error["type"], error["error"]["type"]) == (
            b"event: error\n",
            "error",
            "api_error",
        )
    else:
        assert (name, error["error"]["code"]) == (b"", "upstream_error")
    assert await client.rest() == b""
    assert len(scripted.requests) == 1
    assert gateway.metric("headrace_requests_total", code="502") == 1
    assert gateway.metric("headrace_completion_tokens_total") == 2


SIZED = head(200, "content-length: 9999999", "content-type: application/json")
CHUNKED = head(200, "transfer-encoding: chunked", "content-type: application/json")
cut_json = pytest.mark.parametrize(
    ("start", "frame", "end"),
    [(SIZED, bytes, Act.FIN), (SIZED, bytes, Act.RESET), (CHUNKED, chunk, Act.FIN)],
)


@cut_json
async def test_cut_json_is_tried_elsewhere(
    start_engine: StartEngine,
    start_gateway: StartGateway,
    start: bytes,
    frame: Callable[[bytes], bytes],
    end: Act,
) -> None:
    """A body that breaks off while it is held has not begun for its client."""
    gateway, engines = await _fleet(start_engine, start_gateway, 2)
    scripts = deque([[start, frame(b'{"a":1}'), end]])
    for engine in engines:
        engine.scripts = scripts
    assert (await gateway.post(CHAT)).json["model"] == "m"
    assert _sent(engines) == [1, 1]


@cut_json
@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
async def test_cut_json_is_not_taken_for_whole(
    gateway: Gateway,
    scripted: ScriptedEngine,
    start: bytes,
    frame: Callable[[bytes], bytes],
    end: Act,
    version: bytes,
) -> None:
    """A large body that breaks off resets the client's connection, whatever its framing."""
    scripted.scripts.append([start, frame(b"[" * 2_000_000), end])
    client = await gateway.connect()
    await client.send(post(CHAT).replace(b"HTTP/1.1", version))
    with pytest.raises(ConnectionResetError):
        await client.rest()
    await eventually(lambda: gateway.metric("headrace_requests_total", code="502") == 1)


async def test_cut_http10_stream_is_not_taken_for_whole(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """HTTP/1.0 tells an end from a break by the reset alone."""
    scripted.scripts.append([STREAM_HEAD, chunk(EVENT), Act.FIN])
    client = await gateway.connect()
    await client.send(post(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
    with pytest.raises(ConnectionResetError):
        await client.rest()


async def test_garbage_in_mid_stream(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Broken framing ends the stream with an error event."""
    scripted.scripts.append([STREAM_HEAD, chunk(EVENT), b"zz not a chunk\r\n"])
    answer = await gateway.post(STREAM)
    assert answer.chunks[0] == EVENT
    assert json.loads(answer.chunks[1].removeprefix(b"data: "))["error"]["code"] == "upstream_error"
    await eventually(lambda: scripted.counts.open_connections == 0)


async def test_more_bytes_than_announced(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """A connection on which the engine said too much is not used again."""
    lie = [head(200, "content-length: 2", "content-type: application/json") + b"{}surplus"]
    scripted.scripts += [lie]
    assert (await gateway.post(CHAT)).status in (200, 502)
    assert (await gateway.post(CHAT)).status == 200
    assert scripted.requests[-1].connection != scripted.requests[0].connection


async def test_bytes_after_the_response(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Bytes that nobody asked for close an idle connection; the next request is not answered by them."""
    late = asyncio.Event()
    scripted.scripts.append([*json_reply({"a": 1}), late, *json_reply({"forged": 1})])
    assert (await gateway.post(CHAT)).json == {"a": 1}
    late.set()
    await eventually(lambda: scripted.counts.open_connections == 0)
    assert (await gateway.post(CHAT)).json["model"] == "m"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_error_event_is_reshaped(
    gateway: Gateway, scripted: ScriptedEngine, path: str
) -> None:
    """The engine's own words do not pass, in either API's event."""
    text = "CUDA error in /srv/venv/lib/python3.11/site-packages/vllm/worker.py"
    if path == "/v1/messages":
        payload = {"type": "error", "error": {"type": "internal_error", "message": text}}
        broken = b"event: error\n" + event(payload)
    else:
        broken = b"data: %b\n\n" % json.dumps(error_body(text, "InternalServerError", 500)).encode()
    scripted.scripts.append(stream_reply([EVENT, broken, b"data: [DONE]\n\n"]))
    answer = await gateway.post(STREAM, path)
    assert answer.chunks[0] == EVENT
    assert b"CUDA" not in answer.body
    assert b"site-packages" not in answer.body
    error = json.loads(answer.chunks[1].rpartition(b"data: ")[2])["error"]
    assert error["message"] == "The engine failed while it worked on this request."


async def test_engine_refusals_keep_status_and_lose_paths(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """A refusal is the engine's word on the request, in our shape, without paths of its machine."""
    text = "Cannot open /srv/models/m/config.json: bad value 'x' for top_k"
    scripted.scripts.append(
        json_reply(error_body(text, "BadRequestError", 400, "top_k"), status=400)
    )
    answer = await gateway.post(CHAT)
    assert answer.status == 400
    assert answer.json["error"] == {
        "message": "Cannot open <path>: bad value 'x' for top_k",
        "type": "invalid_request_error",
        "param": "top_k",
        "code": None,
    }
    assert len(scripted.requests) == 1


async def test_context_too_long(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """OpenAI's code for it, whether streamed or not."""
    text = "This model's maximum context length is 2048 tokens. However, you requested 9999."
    body = error_body(text, "BadRequestError", 400, "input_tokens")
    for request in (CHAT, STREAM):
        scripted.scripts.append(json_reply(body, status=400))
        answer = await gateway.post(request)
        assert (answer.status, answer.code) == (400, "context_length_exceeded")
        assert answer.json["error"]["message"] == text


async def test_error_body_that_never_ends(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Only so much of an error is held."""
    scripted.scripts.append(
        [head(400, "transfer-encoding: chunked"), chunk(b"x" * 70_000), Act.HANG]
    )
    assert (await gateway.post(CHAT)).status == 400
    await eventually(lambda: scripted.counts.open_connections == 0)


async def test_event_that_never_ends(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """An event is not held without limit: the stream is broken off."""
    pieces = [chunk(b"x" * 1_000_000)] * 12
    scripted.scripts.append([STREAM_HEAD, chunk(b"data: "), *pieces, Act.HANG])
    answer = await gateway.post(STREAM)
    assert json.loads(answer.body.removeprefix(b"data: "))["error"]["code"] == "upstream_error"
    await eventually(lambda: scripted.counts.aborts == 1)
