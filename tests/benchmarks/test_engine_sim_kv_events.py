"""KV events of the simulated engine: on the wire as vLLM's, and replayed to who missed some."""

import asyncio
import sys

import httpx
import msgspec
import pytest

from benchmarks.engine_sim import kv_events
from benchmarks.engine_sim.kv_events import KvEventsUnavailable
from benchmarks.engine_sim.options import SimOptions
from benchmarks.engine_sim.server import running

zmq = pytest.importorskip("zmq")
zmq_asyncio = pytest.importorskip("zmq.asyncio")

DEADLINE_S = 10.0
END_SEQ = b"\xff" * 8


@pytest.fixture
async def engine():
    """An engine with a small cache, and its sources of events."""
    options = SimOptions(
        port=0,
        prefill_tokens_per_s=0,
        decode_tokens_per_s=0,
        max_model_len=256,
        kv_cache_tokens=256,
        block_size=16,
        adapters={"la": "/adapters/la"},
        kv_events="tcp://*:*",
        kv_events_replay="tcp://*:*",
    )
    async with running(options) as url, httpx.AsyncClient(base_url=url) as client:
        source = (await client.get("/kv_event_sources")).json()["0"]
        yield client, source


@pytest.fixture
def context():
    """Sockets of a subscriber."""
    made = zmq_asyncio.Context()
    yield made
    made.destroy(linger=0)


async def subscribed(context, client, source):
    """A subscriber that is known to be connected, and the number of the next batch."""
    socket = context.socket(zmq.SUB)
    socket.connect(source["endpoint"])
    socket.subscribe(b"")
    number = 0
    async with asyncio.timeout(DEADLINE_S):
        while not await socket.poll(50):
            # Each prompt stores a block: the first one that arrives says that it is connected.
            number += 1
            await complete(client, f"{number:064}")
        seq = -1
        while await socket.poll(50):
            _, told, _ = await socket.recv_multipart()
            seq = int.from_bytes(told, "big")
    return socket, seq + 1


async def complete(client, prompt, **fields):
    """One request."""
    body = {"prompt": prompt, "max_tokens": 1, **fields}
    assert (await client.post("/v1/completions", json=body)).status_code == 200


async def receive(socket):
    """Sequence number and events of the next batch."""
    async with asyncio.timeout(DEADLINE_S):
        topic, seq, payload = await socket.recv_multipart()
    _, events, rank = msgspec.msgpack.decode(payload)
    assert (topic, rank) == (b"", 0)
    return int.from_bytes(seq, "big"), events


async def test_stored_blocks(engine, context):
    """Blocks are told with hashes, parent, tokens and keys, as maps."""
    client, source = engine
    socket, seq = await subscribed(context, client, source)
    await complete(client, "a" * 140)
    got, events = await receive(socket)
    assert got == seq
    (first,) = [event for event in events if event["type"] == "BlockStored"]
    assert first["parent_block_hash"] is None
    assert len(first["block_hashes"]) == 2
    assert first["token_ids"] == [0x61616161] * 32
    assert (first["block_size"], first["medium"], first["group_idx"]) == (16, "GPU", 0)
    assert (first["lora_id"], first["lora_name"]) == (None, None)
    assert first["extra_keys"] == [None, None]
    assert "session_id" not in first
    # The next one shares the first block and the second, and goes on from there.
    await complete(client, "a" * 140 + "b" * 60)
    _, events = await receive(socket)
    (second,) = [event for event in events if event["type"] == "BlockStored"]
    assert second["parent_block_hash"] == first["block_hashes"][1]
    assert len(second["block_hashes"]) == 1
    assert all(0 <= one < 2**64 for one in first["block_hashes"])


async def test_keys_of_adapter_and_salt(engine, context):
    """An adapter's blocks carry its name and number; the salt is in the first block only."""
    client, source = engine
    socket, _ = await subscribed(context, client, source)
    await complete(client, "c" * 140, model="la", cache_salt="s", session_id="x")
    _, events = await receive(socket)
    (stored,) = [event for event in events if event["type"] == "BlockStored"]
    assert stored["extra_keys"] == [["la", "s"], ["la"]]
    assert (stored["lora_id"], stored["lora_name"], stored["session_id"]) == (1, "la", "x")


async def test_removed_blocks(engine, context):
    """What has to make room is told with the hashes under which it was stored."""
    client, source = engine
    socket, _ = await subscribed(context, client, source)
    await complete(client, "d" * 800)
    stored, removed = set(), set()
    _, events = await receive(socket)
    for event in events:
        if event["type"] == "BlockStored":
            stored |= set(event["block_hashes"])
    assert len(stored) == 12
    await complete(client, "e" * 800)
    _, events = await receive(socket)
    for event in events:
        if event["type"] == "BlockRemoved":
            assert event["medium"] == "GPU"
            removed |= set(event["block_hashes"])
    assert len(removed & stored) >= 8


async def test_replay(engine, context):
    """A DEALER gets every batch from a number on, equal to what was published, then the end."""
    client, source = engine
    socket, seq = await subscribed(context, client, source)
    published = []
    for letter in "fghi":
        await complete(client, letter * 70)
        published.append(await receive(socket))
    dealer = context.socket(zmq.DEALER)
    dealer.connect(source["replay_endpoint"])
    for _ in range(2):
        await dealer.send_multipart([b"", (seq + 1).to_bytes(8, "big")])
        replayed = []
        async with asyncio.timeout(DEADLINE_S):
            while True:
                _, topic, told, payload = await dealer.recv_multipart()
                assert topic == b""
                if told == END_SEQ:
                    break
                events = msgspec.msgpack.decode(payload)[1]
                replayed.append((int.from_bytes(told, "big"), events))
        assert replayed == published[1:]


async def test_source_is_declared(engine):
    """`/kv_event_sources` names both endpoints, with the ports that were bound."""
    _, source = engine
    assert source["publisher"] == "zmq"
    for name in ("endpoint", "replay_endpoint"):
        host, _, port = source[name].removeprefix("tcp://").partition(":")
        assert host == "127.0.0.1"
        assert int(port) > 0


async def test_without_pyzmq(monkeypatch):
    """Without pyzmq one line says what is missing."""
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(KvEventsUnavailable, match="pip install pyzmq"):
        await running(SimOptions(port=0, kv_events="tcp://*:5557")).__aenter__()


async def test_endpoint_in_use(engine):
    """An endpoint that cannot be bound is named."""
    _, source = engine
    loop = asyncio.get_running_loop()
    with pytest.raises(KvEventsUnavailable, match="cannot bind"):
        kv_events.KvEventPublisher(loop, "127.0.0.1", source["endpoint"], None)
