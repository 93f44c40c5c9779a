"""A client that leaves frees its engine slot, at whatever moment it goes."""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from base_server import DONE
from eventually import eventually
from raw_client import get, post
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
    from collections.abc import Callable

    from raw_client import RawClient
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine, StartEngine, Step

    from serving.gateway.upstream import Requester
    from serving.routing.snapshot import Replica

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}
EVENT = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})


def _close(client: RawClient) -> None:
    client.close()


def _half_close(client: RawClient) -> None:
    client.writer.write_eof()


@pytest.mark.parametrize("leave", [_close, _half_close])
@pytest.mark.parametrize(
    "script",
    [[Act.HANG], [STREAM_HEAD, Act.HANG], [STREAM_HEAD, chunk(EVENT), Act.HANG]],
    ids=["before the head", "after the head", "in mid-stream"],
)
async def test_leaving(
    gateway: Gateway,
    scripted: ScriptedEngine,
    script: list[Step],
    leave: Callable[[RawClient], None],
) -> None:
    """The engine sees its connection close, and all accounts are even."""
    scripted.scripts.append(script)
    client = await gateway.connect()
    await client.send(post(STREAM))
    await eventually(lambda: scripted.counts.running == 1)
    assert gateway.metric("headrace_requests_in_flight", model="m") == 1
    assert gateway.outstanding_tokens()[0] > 0
    if len(script) == 3:
        assert (await client.head()).status == 200
        assert await client.chunk() == EVENT
    leave(client)
    await eventually(lambda: scripted.counts.aborts == 1, within_s=1.0)
    assert scripted.counts.running == 0
    await eventually(gateway.is_even)
    assert gateway.metric("headrace_client_aborts_total", model="m") == 1
    assert gateway.metric("headrace_requests_total", code="499") == 1


async def test_leaving_while_connecting(
    scripted: ScriptedEngine, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is never sent; the connection, once open, waits for another."""
    gateway = await start_gateway(scripted)
    gate = asyncio.Event()
    connect = gateway.worker.pool._connect

    async def slowly(replica: Replica, requester: Requester) -> None:
        await gate.wait()
        await connect(replica, requester)

    monkeypatch.setattr(gateway.worker.pool, "_connect", slowly)
    client = await gateway.connect()
    await client.send(post(CHAT))
    await eventually(lambda: len(gateway.worker.exchanges) == 1)
    client.close()
    await eventually(gateway.is_even)
    gate.set()
    assert (await gateway.post(CHAT)).status == 200
    assert len(scripted.requests) == 1


async def test_leaving_with_requests_waiting(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Pipelined requests of a client that left are never sent."""
    scripted.scripts.append([Act.HANG])
    client = await gateway.connect()
    await client.send(post(CHAT) * 5)
    await eventually(lambda: scripted.counts.running == 1)
    client.close()
    await eventually(lambda: scripted.counts.aborts == 1)
    assert (await gateway.post(CHAT)).status == 200
    assert len(scripted.requests) == 2


async def test_leaving_with_more_requests_than_are_read(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """Even a client whose requests are not read any further is seen to leave."""
    scripted.scripts.append([Act.HANG])
    client = await gateway.connect()
    await client.send(post(CHAT) * 200)
    await eventually(lambda: scripted.counts.running == 1)
    client.close()
    await eventually(lambda: scripted.counts.aborts == 1, within_s=2.0)


async def test_leaving_in_the_body(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Half a request is no request."""
    client = await gateway.connect()
    await client.send(post(CHAT)[:-3])
    client.close()
    await eventually(lambda: gateway.metric("headrace_client_connections") == 0)
    assert scripted.requests == []


async def test_reset_by_the_client(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """A reset is a way to leave as well."""
    scripted.scripts.append([STREAM_HEAD, *[chunk(EVENT)] * 50, Act.HANG])
    client = await gateway.connect()
    await client.send(post(STREAM))
    await client.head()
    own = client.writer.get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()
    await eventually(lambda: scripted.counts.aborts == 1, within_s=1.0)


async def test_accounts_are_even_after_any_mix(
    start_engine: StartEngine, start_gateway: StartGateway, quick_sweep: None
) -> None:
    """200 requests of all outcomes at once: nothing stays charged, every one is counted once."""
    rng = random.Random(20261124)  # noqa: S311  (a seeded mix of outcomes)
    engines = [await start_engine() for _ in range(3)]
    gateway = await start_gateway(*engines, first_byte_s=0.3, idle_s=0.3)
    scripts: list[list[Step]] = [
        [Act.RESET],
        [Act.HANG],
        [STREAM_HEAD, Act.FIN],
        [STREAM_HEAD, chunk(EVENT), Act.RESET],
        [STREAM_HEAD, chunk(EVENT), Act.HANG],
        [b"garbage\r\n"],
        json_reply({}),
        json_reply({}, framing="closed"),
        json_reply(error_body("x", "X", 400), status=400),
        json_reply(error_body("x", "X", 500), status=500),
        [head(200, "content-length: 9"), b"{", Act.FIN],
        stream_reply([EVENT] * 5),
        stream_reply([*[EVENT] * 5, DONE]),
    ]
    for engine in engines:
        engine.scripts.extend(rng.choice(scripts) for _ in range(60))

    async def one(number: int) -> None:
        client = await gateway.connect()
        await client.send(post({**CHAT, "stream": rng.random() < 0.5, "max_tokens": number}))
        if rng.random() < 0.3:
            for _ in range(rng.randrange(20)):
                await asyncio.sleep(0)
        else:
            with suppress(ConnectionResetError, asyncio.IncompleteReadError):
                await client.response()
        client.close()

    for start in range(0, 200, 50):
        async with asyncio.TaskGroup() as tasks:
            for number in range(start, start + 50):
                tasks.create_task(one(number))
    await eventually(gateway.is_even)
    assert gateway.outstanding_tokens() == [0.0, 0.0, 0.0]
    await eventually(lambda: all(engine.counts.running == 0 for engine in engines))
    ended = gateway.metric("headrace_requests_total", endpoint="/v1/chat/completions")
    assert 150 < ended <= 200
    assert (await gateway.ask(get("/healthz"))).status == 200
