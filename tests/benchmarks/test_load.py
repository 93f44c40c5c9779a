"""The load generator counts what it should and notices every broken response."""

import asyncio
import os

import pytest

from benchmarks.load import LoadPlan, quantiles_ms, run

JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
CHUNK = b'data: {"choices":[{"index":0}]}\n\n'
DONE = b"data: [DONE]\n\n"


def sized(body):
    """A whole JSON response."""
    return JSON_HEAD % len(body) + body


def stream(*events):
    """A chunked stream without its end."""
    return SSE_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)


END = b"0\r\n\r\n"

# What the server sends, whether it then closes, whether a stream was asked for, the verdict.
BROKEN = {
    "status": (b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", False, False, "status 503"),
    "not json": (sized(b"hello"), False, False, "body is not a completion"),
    "tokens": (
        sized(b'{"choices":[{}],"usage":{"completion_tokens":1}}'),
        False,
        False,
        "answer of 1 tokens instead of 2",
    ),
    "short body": (JSON_HEAD % 99 + b"{", True, False, "connection closed within a response"),
    "nothing": (b"", True, False, "no response"),
    "cut stream": (stream(CHUNK), True, True, "connection closed within a response"),
    "lost event": (
        stream(CHUNK, CHUNK, DONE) + END,
        False,
        True,
        "stream of 3 events instead of 4",
    ),
    "no done": (stream(CHUNK, CHUNK, CHUNK, CHUNK) + END, False, True, "does not end in [DONE]"),
    "half event": (stream(CHUNK, CHUNK, CHUNK, DONE[:-1]) + END, False, True, "within an event"),
    "bad event": (
        stream(CHUNK, b"data: {}\n\n", CHUNK, DONE) + END,
        False,
        True,
        "event is not a completion chunk",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_broken_response_is_noticed(name):
    """Each kind of broken response is counted under what is wrong with it."""
    response, closes, is_stream, verdict = BROKEN[name]

    class Server(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            # A request of this size comes in one piece.
            self.transport.write(response)
            if closes:
                self.transport.close()

    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    async with server:
        plan = LoadPlan(
            mode="open",
            targets=(server.sockets[0].getsockname(),),
            connections=2,
            rate_per_s=100.0,
            warmup_s=0.0,
            window_s=0.1,
            stream=is_stream,
            num_tokens=2,
        )
        result = await run(plan)
        # Until the server has seen its connections close.
        await asyncio.sleep(0)
    assert len(result.failures) == 1
    (reason, count), *_ = result.failures.items()
    assert verdict in reason
    # Failures count for the whole run, requests for the window.
    assert count >= result.num_requests > 0


async def test_closed_run_over_engine(engine_port):
    """Requests one after another: all right, and the CPU of the target is accounted for."""
    plan = LoadPlan(
        mode="closed",
        targets=(("127.0.0.1", engine_port),),
        connections=2,
        warmup_s=0.0,
        window_s=0.2,
        account_pid=os.getpid(),
    )
    result = await run(plan)
    assert result.failures == {}
    assert result.num_requests > 10
    # This process and the engine, which it has started: two cores' worth at most.
    assert 0 < result.cpu_s <= result.window_s * 2.2


@pytest.mark.parametrize("pacing", ["staggered", "steps"])
async def test_steady_run_counts_events(engine_port, pacing):
    """Four streams with an event every 5 ms: only events in the window, and as many as are due."""
    plan = LoadPlan(
        mode="steady",
        targets=(("127.0.0.1", engine_port),),
        connections=4,
        warmup_s=0.0,
        window_s=0.2,
        spread_s=0.1,
        stream=True,
        pacing=pacing,
        interval_s=0.005,
    )
    result = await run(plan)
    assert result.failures == {}
    assert result.num_requests == 0
    assert 80 <= result.num_events <= 170


def test_quantiles_are_nearest_ranks():
    """Quantiles are samples, in milliseconds."""
    found = quantiles_ms([index / 1000 for index in range(101)])
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert quantiles_ms([]) == {}
