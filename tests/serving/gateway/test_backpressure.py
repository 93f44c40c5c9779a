"""A slow client slows its own engine connection and nothing else; memory stays bounded."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest
from base_server import DONE
from eventually import eventually
from raw_client import get, post
from scripted_engine import STREAM_HEAD, chunk, head, stream_reply

if TYPE_CHECKING:
    from raw_client import RawClient
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine, StartEngine

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
EVENT = b"data: %b\n\n" % (b"x" * 16_000)
HALF = b"y" * 62_000
"""Less than the gateway buffers before it stops reading; twice that is more."""
NUM_EVENTS = 2_000
TOTAL_BYTES = NUM_EVENTS * len(EVENT)
HELD_BYTES = 12 * 1024 * 1024
"""What kernels may hold on the way: loopback's send and receive buffers grow to 6 MiB and 4 MiB."""


async def _until_it_stands_still(scripted: ScriptedEngine) -> int:
    """Bytes that the engine could push before it was held up."""
    before = -1
    while before != scripted.counts.bytes_sent or before < len(EVENT):
        before = scripted.counts.bytes_sent
        await asyncio.sleep(0.1)
    return before


async def test_slow_stream(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """The engine is held up while the client does not read; then every byte arrives."""
    scripted.scripts.append(stream_reply([*[EVENT] * NUM_EVENTS, DONE]))
    client = await gateway.connect(receive_buffer_bytes=8192)
    await client.send(post(STREAM))
    pushed = await _until_it_stands_still(scripted)
    assert pushed < HELD_BYTES < TOTAL_BYTES / 2
    (connection,) = [one for one in gateway.worker.connections if one.exchange is not None]
    assert connection.is_write_paused
    assert connection._transport.get_write_buffer_size() < 1024 * 1024
    answer = await client.response()
    assert answer.body == EVENT * NUM_EVENTS + DONE
    assert gateway.metric("headrace_requests_total", code="200") == 1


async def test_slow_json(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """So it is with a large body that is no stream."""
    piece = b"y" * 65_536
    lines = (f"content-length: {512 * len(piece)}", "content-type: application/json")
    scripted.scripts.append([head(200, *lines), *[piece] * 512])
    client = await gateway.connect(receive_buffer_bytes=8192)
    await client.send(post(CHAT), post(CHAT))
    assert await _until_it_stands_still(scripted) < HELD_BYTES
    assert (await client.response()).body == piece * 512
    assert (await client.response()).status == 200


async def test_slow_client_does_not_slow_another(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """A stream beside the one that stands still is complete."""
    scripted.scripts.append(stream_reply([*[EVENT] * NUM_EVENTS, DONE]))
    slow = await gateway.connect(receive_buffer_bytes=8192)
    await slow.send(post(STREAM))
    pushed = await _until_it_stands_still(scripted)
    scripted.num_tokens = 100
    answer = await gateway.post(STREAM)
    assert len(answer.chunks) == 103
    assert scripted.counts.bytes_sent - pushed < 100_000
    slow.close()
    await eventually(lambda: scripted.counts.aborts == 1)


async def _until_only_the_client_lags(gateway: Gateway, scripted: ScriptedEngine) -> RawClient:
    """An answer that the engine has given whole and the gateway holds a good part of."""
    # Inherited by the connections: the kernel shall hold little, so that the gateway has to.
    gateway.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    lines = (f"content-length: {2 * len(HALF)}", "content-type: application/json")
    scripted.scripts.append([head(200, *lines), HALF, HALF])
    client = await gateway.connect(receive_buffer_bytes=4096)
    await client.send(post(CHAT))
    await eventually(lambda: len(scripted.requests) == 1 and not gateway.worker.exchanges)
    (connection,) = gateway.worker.connections
    assert connection.is_write_paused
    return client


async def test_engine_connection_after_a_slow_client(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """A connection whose reading was held up is read again by its next request."""
    client = await _until_only_the_client_lags(gateway, scripted)
    assert (await gateway.post(CHAT)).status == 200
    assert scripted.requests[1].connection == scripted.requests[0].connection
    assert (await client.response()).body == 2 * HALF


async def test_slow_engine_is_waited_for(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """A large request body waits until the engine reads it, and arrives whole."""
    scripted = await start_engine()
    gateway = await start_gateway(scripted)
    scripted.is_reading = False
    text = "z" * 8_000_000
    client = await gateway.connect()
    await client.send(post({**CHAT, "text": text}))
    await eventually(lambda: len(gateway.worker.exchanges) == 1)
    assert scripted.requests == []
    scripted.read_on()
    assert (await client.response()).status == 200
    assert scripted.requests[0].json["text"] == text


async def test_shutdown_waits_for_a_slow_client(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """An answer that is written but not yet read is not cut off by the drain."""
    gateway = await start_gateway(scripted, drain_s=10.0)
    client = await _until_only_the_client_lags(gateway, scripted)
    gateway.worker.stop()
    # Long enough for the drain to look several times.
    with pytest.raises(AssertionError, match="never came true"):
        await eventually(lambda: not gateway.worker.connections, within_s=0.4)
    assert (await client.response()).body == 2 * HALF
    assert await client.rest() == b""


async def test_drain_refuses_new_connections(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """A stream in flight ends whole, an idle connection is closed, a new one is refused."""
    gateway = await start_gateway(scripted, drain_s=10.0)
    gate = asyncio.Event()
    scripted.scripts.append([STREAM_HEAD, chunk(EVENT), gate, chunk(DONE), b"0\r\n\r\n"])
    client, idle = await gateway.connect(), await gateway.connect()
    await idle.send(get("/healthz"))
    await idle.response()
    await client.send(post(STREAM))
    await client.head()
    assert await client.chunk() == EVENT
    gateway.worker.stop()
    assert await idle.rest() == b""
    with pytest.raises(ConnectionRefusedError):
        await gateway.connect()
    gate.set()
    assert await client.chunk() == DONE
    assert await client.chunk() == b""
    assert await client.rest() == b""
