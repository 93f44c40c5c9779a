"""Clients that leave free their place in the engine within a second: by the engine's own count.

The second is the contract (design, invariant 4), so these tests measure it.
"""

import json
import socket
import struct
import time

import pytest

pytestmark = pytest.mark.engine

FREED_WITHIN_S = 1.0
START_DEADLINE_S = 30.0
TOKENS = 1500
LINGER_ZERO = struct.pack("ii", 1, 0)


@pytest.fixture
def idle_engine(engine, until):
    """The engine, when nothing is left of earlier tests."""
    until(lambda: engine.num_running() == 0, START_DEADLINE_S, "the engine is idle")
    return engine


def send(gateway, question, path="/v1/chat/completions", **fields):
    """Sends a request that would take minutes."""
    body = {
        "model": gateway.model,
        "messages": question,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "min_tokens": TOKENS,
        **fields,
    }
    text = json.dumps(body).encode()
    connection = socket.create_connection((gateway.host, gateway.port), START_DEADLINE_S)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: {gateway.name}\r\n"
        f"authorization: Bearer {gateway.api_key}\r\ncontent-length: {len(text)}\r\n\r\n".encode()
        + text
    )
    return connection


def close(connection):
    connection.close()


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
    connection.close()


def half_close(connection):
    connection.shutdown(socket.SHUT_WR)


def seconds_until_free(engine, until):
    start_s = time.monotonic()
    until(lambda: engine.num_running() == 0, START_DEADLINE_S, "the engine has dropped the request")
    return time.monotonic() - start_s


@pytest.mark.parametrize("leave", [close, reset, half_close])
@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_client_that_leaves_frees_its_place(
    idle_engine, gateway, question, until, leave, is_stream
):
    """However a client leaves, streamed to or still waiting, the engine stops at once."""
    aborts = gateway.metric("headrace_client_aborts_total")
    closed = gateway.num_ended(code="499")
    with send(gateway, question, stream=is_stream) as connection:
        if is_stream:
            received = b""
            while received.count(b"data: ") < 3:
                received += connection.recv(65536)
        until(lambda: idle_engine.num_running() == 1, START_DEADLINE_S, "the engine works on it")
        leave(connection)
        freed_after_s = seconds_until_free(idle_engine, until)
    assert freed_after_s < FREED_WITHIN_S
    assert gateway.metric("headrace_client_aborts_total") == aborts + 1
    assert gateway.num_ended(code="499") == closed + 1
    assert gateway.metric("headrace_requests_in_flight") == 0


def test_client_of_anthropic_s_route_that_leaves(idle_engine, gateway, question, until):
    """The same on the other dialect's route."""
    with send(gateway, question, path="/v1/messages", stream=True) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        until(lambda: idle_engine.num_running() == 1, START_DEADLINE_S, "the engine works on it")
        close(connection)
        assert seconds_until_free(idle_engine, until) < FREED_WITHIN_S


def test_openai_client_that_closes_its_stream(idle_engine, gateway, client, question, until):
    """`stream.close()` of OpenAI's client is such a departure."""
    stream = client.chat.completions.create(
        model=gateway.model,
        messages=question,
        max_tokens=TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    until(lambda: idle_engine.num_running() == 1, START_DEADLINE_S, "the engine works on it")
    stream.close()
    assert seconds_until_free(idle_engine, until) < FREED_WITHIN_S


def test_one_of_several_clients_leaves(idle_engine, gateway, client, question, until):
    """The others' streams go on to their ends."""
    stays = client.chat.completions.create(
        model=gateway.model,
        messages=question,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    with send(gateway, question, stream=True) as leaves:
        until(lambda: idle_engine.num_running() == 2, START_DEADLINE_S, "the engine works on both")
        close(leaves)
        chunks = list(stays)
    assert chunks[-1].usage.completion_tokens == 60
    until(lambda: idle_engine.num_running() == 0, START_DEADLINE_S, "the engine is idle")
