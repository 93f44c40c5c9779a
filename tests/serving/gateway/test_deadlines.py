"""Deadlines: of the replica's answer, of its stream, of the whole, and of the client."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from raw_client import get, post
from scripted_engine import STREAM_HEAD, Act, chunk, event, head

if TYPE_CHECKING:
    from running_gateway import StartGateway
    from scripted_engine import ScriptedEngine, Step

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}
EVENT = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
SHORT_S = 0.1

pytestmark = pytest.mark.usefixtures("quick_sweep")


@pytest.mark.parametrize("script", [[Act.HANG], [STREAM_HEAD, Act.HANG], [b"HTTP/1.1 2", Act.HANG]])
async def test_first_byte(
    scripted: ScriptedEngine, start_gateway: StartGateway, script: list[Step]
) -> None:
    """An engine that does not begin to answer: 504, its slot is freed, the connection goes on."""
    gateway = await start_gateway(scripted, first_byte_s=SHORT_S)
    scripted.scripts.append(script)
    client = await gateway.connect()
    await client.send(post(STREAM))
    answer = await client.response()
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    assert answer.json["error"]["message"] == "The engine did not answer within 0.1 s."
    await eventually(lambda: scripted.counts.aborts == 1)
    await client.send(post(CHAT))
    assert (await client.response()).status == 200


async def test_idle_stream(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """A stream that stands still ends with an error event."""
    gateway = await start_gateway(scripted, idle_s=SHORT_S)
    scripted.scripts.append([STREAM_HEAD, chunk(EVENT), Act.HANG])
    client = await gateway.connect()
    await client.send(post(STREAM))
    answer = await client.response()
    assert answer.chunks[0] == EVENT
    error = json.loads(answer.chunks[1].removeprefix(b"data: "))["error"]
    assert (error["code"], error["message"]) == (
        "deadline_exceeded",
        "The response stood still for 0.1 s.",
    )
    assert await client.rest() == b""
    await eventually(lambda: scripted.counts.aborts == 1)
    assert gateway.metric("headrace_requests_total", code="504") == 1


async def test_idle_json(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """A body that stands still on its way is reset; it was too large to be held until its end."""
    gateway = await start_gateway(scripted, idle_s=SHORT_S)
    lines = ("content-length: 9999999", "content-type: application/json")
    scripted.scripts.append([head(200, *lines), b"{" * 2_000_000, Act.HANG])
    client = await gateway.connect()
    await client.send(post(CHAT))
    with pytest.raises(ConnectionResetError):
        await client.rest()
    await eventually(lambda: scripted.counts.aborts == 1)


async def test_held_json(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """One that is held until its end has not begun for its client: it is the first byte that is late."""
    gateway = await start_gateway(scripted, first_byte_s=SHORT_S)
    lines = ("content-length: 9", "content-type: application/json")
    scripted.scripts.append([head(200, *lines), b"{", Act.HANG])
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    await eventually(lambda: scripted.counts.aborts == 1)


async def test_total(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """A stream that goes on for ever is ended, however lively it is."""
    gateway = await start_gateway(scripted, total_s=2 * SHORT_S, idle_s=5.0)
    step: list[Step] = [chunk(EVENT), 0.01]
    scripted.scripts.append([STREAM_HEAD, *step * 500])
    answer = await gateway.post(STREAM)
    assert answer.chunks[-2] == EVENT
    error = json.loads(answer.chunks[-1].removeprefix(b"data: "))["error"]
    assert error["message"] == "The request took longer than 0.2 s."
    await eventually(lambda: scripted.counts.aborts == 1)


async def test_connect(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """A replica that does not accept in time is down."""
    gateway = await start_gateway(scripted, connect_s=SHORT_S)
    scripted.refuse()
    # A full backlog: the kernel answers no further handshake.
    with socket.socket() as full:
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.1", scripted.port))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", scripted.port))
        answer = await gateway.post(CHAT)
        for one in waiting:
            one.close()
    assert (answer.status, answer.code) == (503, "no_replica_available")


@pytest.mark.parametrize("sent", [b"GET /hea", b"GET /healthz HTTP/1.1\r\nhost: h\r\n"])
async def test_client_head(
    scripted: ScriptedEngine, start_gateway: StartGateway, sent: bytes
) -> None:
    """A head that stays incomplete: 408 and the end."""
    gateway = await start_gateway(scripted, client_head_s=SHORT_S)
    client = await gateway.connect()
    await client.send(sent)
    answer = await client.response()
    assert (answer.status, answer.code) == (408, "request_timeout")
    assert await client.rest() == b""


async def test_client_head_in_drops(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """A client that sends its head byte by byte does not win time with each."""
    gateway = await start_gateway(scripted, client_head_s=4 * SHORT_S)
    client = await gateway.connect()
    await client.send(b"GET /healthz HTTP/1.1\r\nx: ")
    async with asyncio.TaskGroup() as tasks:
        answered = tasks.create_task(client.response())
        while not answered.done():
            await client.send(b"y")
            await asyncio.sleep(SHORT_S / 10)
    answer = answered.result()
    assert (answer.status, answer.code) == (408, "request_timeout")


async def test_client_body(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """A body that stays incomplete: 408 and the end; no engine is asked."""
    gateway = await start_gateway(scripted, client_body_s=SHORT_S)
    client = await gateway.connect()
    await client.send(post(CHAT)[:-1])
    answer = await client.response()
    assert (answer.status, answer.code) == (408, "request_timeout")
    assert await client.rest() == b""
    assert scripted.requests == []


async def test_keep_alive(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """An idle connection is closed in order."""
    gateway = await start_gateway(scripted, keep_alive_s=SHORT_S)
    client = await gateway.connect()
    await client.send(get("/healthz"))
    assert (await client.response()).status == 200
    assert await client.rest() == b""
    await eventually(lambda: gateway.metric("headrace_client_connections") == 0)


async def test_client_that_reads_no_stream(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """A client that stops reading is cut off, and the engine's slot is freed."""
    gateway = await start_gateway(scripted, idle_s=2 * SHORT_S)
    scripted.scripts.append([STREAM_HEAD, *[chunk(b"data: %b\n\n" % (b"x" * 60_000))] * 500])
    client = await gateway.connect(receive_buffer_bytes=4096)
    await client.send(post(STREAM))
    await eventually(lambda: scripted.counts.aborts == 1)
    await eventually(lambda: gateway.metric("headrace_client_connections") == 0)
    assert gateway.metric("headrace_requests_total", code="504") == 1


async def test_client_that_reads_no_answers_of_ours(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """A client that asks and asks and never reads does not keep its connection."""
    gateway = await start_gateway(scripted, keep_alive_s=2 * SHORT_S)
    client = await gateway.connect(receive_buffer_bytes=4096)
    client.writer.write(get("/metrics") * 2000)
    await eventually(lambda: gateway.metric("headrace_client_connections") == 1)
    await eventually(lambda: gateway.metric("headrace_client_connections") == 0)


async def test_refused_client_that_sends_on(
    scripted: ScriptedEngine, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a last answer the connection lingers for a bounded time, so that the answer arrives."""
    monkeypatch.setattr("serving.gateway.client._LINGER_S", SHORT_S)
    gateway = await start_gateway(scripted)
    client = await gateway.connect()
    await client.send(
        b"POST /nothing HTTP/1.1\r\nhost: h\r\ncontent-length: 9999999\r\n\r\n", b"x" * 100_000
    )
    assert (await client.response()).status == 404
    await eventually(lambda: gateway.metric("headrace_client_connections") == 0)
