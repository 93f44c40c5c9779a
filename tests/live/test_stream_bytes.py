"""Streams byte by byte: plain sockets through the gateway, beside the engine itself."""

import json
import re
import socket
import uuid
from http.client import HTTPConnection

import pytest

pytestmark = pytest.mark.engine

DEADLINE_S = 60.0
CHAT = "/v1/chat/completions"
NUM_TOKENS = 120
MOMENTS = (1, 20, 60)
"""Events after which the engine is asked."""
# How far an engine may get between a token's arrival here and its answer about how far it is.
SLACK_TOKENS = 40


def body_of(gateway, question, **fields):
    return {
        "model": gateway.model,
        "messages": question,
        "stream": True,
        "temperature": 0,
        "cache_salt": uuid.uuid4().hex,
        **fields,
    }


def read_events(server, path, body, api_key=""):
    """Bytes of a response's body, dechunked."""
    connection = HTTPConnection(server.host, server.port, timeout=DEADLINE_S)
    headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200
    events = response.read()
    connection.close()
    return events


def without_ids(events):
    """Events without what names or dates one request."""
    events = re.sub(rb'"(id|item_id)":"[^"]*"', b'"id":""', events)
    return re.sub(rb'"(created|created_at)":[\d.]+', b'"created":0', events)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"max_tokens": 12, "stream_options": {"include_usage": True}}),
        (
            CHAT,
            {
                "max_tokens": 12,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            },
        ),
        (CHAT, {"max_tokens": 6, "logprobs": True, "top_logprobs": 5, "ignore_eos": True,
                "stream_options": {"include_usage": True}}),
        ("/v1/messages", {"max_tokens": 12}),
    ],
    ids=["usage", "usage in each chunk", "large chunks", "messages"],
)  # fmt: skip
def test_bytes_are_the_engine_s(engine, gateway, question, path, fields):
    """What the gateway relays is, but for ids and dates, what the engine wrote."""
    theirs = read_events(engine, path, body_of(gateway, question, **fields))
    ours = read_events(gateway, path, body_of(gateway, question, **fields), gateway.api_key)
    assert without_ids(ours) == without_ids(theirs)
    assert ours.count(b"data: ") > 3


def test_bytes_without_usage_are_the_engine_s(engine, gateway, question):
    """The usage that the gateway asks for leaves no trace in a stream whose client did not.

    But one: the engine puts its fingerprint into the usage chunk where there is one, and that
    chunk is withheld.
    """
    fields = {"max_tokens": 12}
    theirs = read_events(engine, CHAT, body_of(gateway, question, **fields))
    ours = read_events(gateway, CHAT, body_of(gateway, question, **fields), gateway.api_key)
    theirs = re.sub(rb',"system_fingerprint":"[^"]*"', b"", theirs)
    assert without_ids(ours) == without_ids(theirs)
    assert ours.endswith(b"data: [DONE]\n\n")
    assert b'"usage"' not in ours


def test_answer_is_the_engine_s(engine, gateway, question):
    """So is an answer that is not streamed."""
    fields = {"max_tokens": 12, "stream": False}
    theirs = read_events(engine, CHAT, body_of(gateway, question, **fields))
    ours = read_events(gateway, CHAT, body_of(gateway, question, **fields), gateway.api_key)
    assert without_ids(ours) == without_ids(theirs)


class Stream:
    """A stream on a plain socket, read one event at a time; checks the chunked framing."""

    def __init__(self, gateway, body):
        self.socket = socket.create_connection((gateway.host, gateway.port), DEADLINE_S)
        self.file = self.socket.makefile("rb")
        text = json.dumps(body).encode()
        self.socket.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: {gateway.name}\r\n"
            f"authorization: Bearer {gateway.api_key}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(text)}\r\n\r\n".encode()
            + text
        )
        self.status = self.file.readline()
        self.headers = dict(
            line.rstrip(b"\r\n").split(b": ", 1) for line in iter(self.file.readline, b"\r\n")
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.socket.close()

    def chunk(self):
        """The next chunk's payload; empty at the end."""
        size = int(self.file.readline(), 16)
        payload = self.file.read(size)
        assert self.file.read(2) == b"\r\n"
        return payload


def test_stream_on_a_plain_socket(gateway, question):
    """Head and chunks are HTTP/1.1 to the letter, and the connection serves the next request."""
    body = body_of(gateway, question, max_tokens=4)
    with Stream(gateway, body) as stream:
        assert stream.status == b"HTTP/1.1 200 OK\r\n"
        assert stream.headers[b"transfer-encoding"] == b"chunked"
        assert stream.headers[b"content-type"].startswith(b"text/event-stream")
        assert stream.headers[b"cache-control"] == b"no-cache"
        assert b"content-length" not in stream.headers
        payload = b"".join(iter(stream.chunk, b""))
        assert payload.endswith(b"data: [DONE]\n\n")
        stream.socket.sendall(f"GET /healthz HTTP/1.1\r\nhost: {gateway.name}\r\n\r\n".encode())
        assert stream.file.readline() == b"HTTP/1.1 200 OK\r\n"


def test_events_come_while_the_engine_works(engine, gateway, question):
    """Each event is here before the engine has gone much further: nothing is gathered on the way.

    Told by the engine's own count of tokens at three moments of one stream, not by times. A few
    tokens have no event: they are the first bytes of a character.
    """
    body = body_of(gateway, question, max_tokens=NUM_TOKENS, ignore_eos=True)
    before = engine.metric("vllm:generation_tokens_total")
    with Stream(gateway, body) as stream:
        num_events, made = 0, []
        while payload := stream.chunk():
            num_events += payload.count(b"data: ")
            if len(made) < len(MOMENTS) and num_events >= MOMENTS[len(made)]:
                made.append(engine.metric("vllm:generation_tokens_total") - before)
    assert num_events > MOMENTS[-1]
    assert engine.metric("vllm:generation_tokens_total") - before == NUM_TOKENS
    ahead = [tokens - events for tokens, events in zip(made, MOMENTS, strict=True)]
    assert max(ahead) < SLACK_TOKENS, ahead
