"""KV events as vLLM publishes them (vllm/distributed/kv_events.py): a PUB socket and a replay socket.

Frames are `[topic, seq (u64 big-endian), msgpack]`, the payload `[ts, [event, …], dp_rank]`, events are
maps. Subscribers that missed some ask the replay socket. Both sockets belong to the event loop's
thread; publishing never waits: what a subscriber does not take in time it misses, and can see that by
the sequence numbers. Used by `engine.py`. Needs pyzmq, which vLLM brings.

Unlike vLLM, which connects to an endpoint that names a host, this always binds: on the server's own
address where the endpoint is a wildcard.
"""

from __future__ import annotations

import importlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks.engine_sim.block_hash import published_hash

if TYPE_CHECKING:
    import asyncio

    from benchmarks.engine_sim.scheduler import StepDone, Stored

HIGH_WATER_MARK = 100_000
BUFFER_STEPS = 10_000
MEDIUM = "GPU"
_END_SEQ = (-1).to_bytes(8, "big", signed=True)
_MISSING = "KV events need pyzmq, which comes with vLLM: pip install pyzmq"


class KvEventsUnavailable(Exception):
    """KV events cannot be published; the text says what to do."""


class BlockStored(msgspec.Struct, omit_defaults=True, tag=True):
    """Blocks that are in the cache now, one after the other in one request."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[str] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, omit_defaults=True, tag=True):
    """Blocks that have been evicted."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """What one step of the engine changed."""

    ts: float
    events: list[BlockStored | BlockRemoved]
    data_parallel_rank: int | None = None


def events_of(step: StepDone, block_size: int) -> list[BlockStored | BlockRemoved]:
    """The events of a step; blocks are removed before others take their place."""
    events: list[BlockStored | BlockRemoved] = []
    if step.removed:
        hashes = [published_hash(one) for one in step.removed]
        events.append(BlockRemoved(hashes, MEDIUM, group_idx=0))
    events += [_stored(one, block_size) for one in step.stored]
    return events


def _stored(stored: Stored, block_size: int) -> BlockStored:
    sequence, first = stored.sequence, stored.first_index
    end = first + len(stored.hashes)
    adapter = sequence.key.adapter
    owner = sequence.owner
    return BlockStored(
        block_hashes=[published_hash(one) for one in stored.hashes],
        parent_block_hash=published_hash(sequence.hashes[first - 1]) if first else None,
        token_ids=sequence.tokens(first * block_size, end * block_size),
        block_size=block_size,
        lora_id=None if owner is None else owner.lora_id,
        medium=MEDIUM,
        lora_name=None if adapter is None else adapter[0],
        extra_keys=[sequence.key.published(index) for index in range(first, end)],
        group_idx=0,
        kv_cache_spec_kind="full_attention",
        session_id=None if owner is None else owner.session_id,
    )


class KvEventPublisher:
    """The two sockets.

    Attributes:
        endpoint: Where events are published, with the port that was bound.
        replay_endpoint: Where they are replayed, or None.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, host: str, endpoint: str, replay: str | None
    ) -> None:
        """Binds.

        Args:
            loop: Serves the replay socket.
            host: Address for wildcards.
            endpoint: tcp://HOST:PORT or tcp://*:PORT.
            replay: The same for the replay socket, or None.

        Raises:
            KvEventsUnavailable: Without pyzmq, or if an endpoint cannot be bound.

        Resources:
            `close` releases the sockets.
        """
        try:
            self._zmq: Any = importlib.import_module("zmq")
        except ImportError:
            raise KvEventsUnavailable(_MISSING) from None
        self._loop = loop
        self._context = self._zmq.Context()
        self._pub = self._context.socket(self._zmq.PUB)
        self._replay: Any = None
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=BUFFER_STEPS)
        self._next_seq = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self.endpoint = self._bind(self._pub, endpoint, host)
        self.replay_endpoint: str | None = None
        if replay is not None:
            self._replay = self._context.socket(self._zmq.ROUTER)
            self.replay_endpoint = self._bind(self._replay, replay, host)
            # The descriptor of a ZeroMQ socket signals edges: it is read until nothing is left.
            loop.add_reader(self._replay.fileno(), self._serve_replay)

    def publish(self, events: list[BlockStored | BlockRemoved]) -> None:
        """Sends the events of one step."""
        seq = self._next_seq.to_bytes(8, "big")
        self._next_seq += 1
        payload = self._encode(EventBatch(time.time(), events, 0))
        self._pub.send_multipart((b"", seq, payload), self._zmq.NOBLOCK)
        self._buffer.append((seq, payload))
        if self._replay is not None:
            self._serve_replay()

    def close(self) -> None:
        """Releases the sockets."""
        if self._replay is not None:
            self._loop.remove_reader(self._replay.fileno())
        self._context.destroy(linger=0)

    def _bind(self, socket: Any, endpoint: str, host: str) -> str:
        socket.set_hwm(HIGH_WATER_MARK)
        address = endpoint.replace("//*", f"//{host}", 1)
        try:
            socket.bind(address)
        except self._zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise KvEventsUnavailable(f"cannot bind {address} for KV events: {error}") from None
        bound: str = socket.getsockopt_string(self._zmq.LAST_ENDPOINT)
        return bound

    def _serve_replay(self) -> None:
        """Answers all requests for replay that have come."""
        zmq = self._zmq
        while self._replay.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            frames = self._replay.recv_multipart(zmq.NOBLOCK)
            if len(frames) != 3:
                continue
            client, _, start = frames
            for seq, payload in self._buffer:
                # Of one length and big-endian: bytes compare as the numbers do.
                if seq >= start:
                    self._send(client, seq, payload)
            self._send(client, _END_SEQ, b"")

    def _send(self, client: bytes, seq: bytes, payload: bytes) -> None:
        try:
            self._replay.send_multipart((client, b"", b"", seq, payload), self._zmq.NOBLOCK)
        except self._zmq.Again:
            # Its queue is full: it sees the gap, and asks again.
            return
