"""However a byte stream is split on its way, what comes of it is the same."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_client import get, post
from running_gateway import sample_sum
from scripted_engine import STREAM_HEAD, Act, chat_events, chunk, event, head, json_reply

if TYPE_CHECKING:
    from running_gateway import Gateway
    from scripted_engine import ScriptedEngine

CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
STREAM = {**CHAT, "stream": True}
USAGE = {"prompt_tokens": 11, "total_tokens": 15, "completion_tokens": 4}
EVENTS = chat_events("x", "m", 4, usage=USAGE)

PIPELINE = (
    post(CHAT, x_request_id="1")
    + get("/healthz", x_request_id="2")
    + b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nx-request-id: 3\r\n"
    + b'transfer-encoding: chunked\r\n\r\n9;a=b\r\n{"model":\r\n4\r\n"m"}\r\n0\r\nx-t: 1\r\n\r\n'
    + post(b"[]", x_request_id="4")
    + post(STREAM, x_request_id="5", upgrade="h2c", connection="Upgrade")
    + b"\r\n"
    + get("/nothing", x_request_id="6", empty="")
    + post(CHAT, x_request_id="7", connection="close")
)
STATUSES = [200, 200, 200, 400, 200, 404, 200]

any_split = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _pieces(whole: bytes, cuts: list[int]) -> list[bytes]:
    """The bytes, cut at these places."""
    places = [0, *sorted({cut % len(whole) for cut in cuts}), len(whole)]
    return [whole[start:end] for start, end in pairwise(places) if end > start]


@any_split
@given(cuts=st.lists(st.integers(0, len(PIPELINE)), max_size=40))
async def test_any_split_of_the_requests(
    gateway: Gateway, scripted: ScriptedEngine, cuts: list[int]
) -> None:
    """Pipelined requests with sized and chunked bodies get the same answers in the same order."""
    scripted.requests.clear()
    client = await gateway.connect()
    await client.send(*_pieces(PIPELINE, cuts))
    answers = [await client.response() for _ in STATUSES]
    assert [answer.status for answer in answers] == STATUSES
    assert [answer.headers["x-request-id"] for answer in answers] == list("1234567")
    assert await client.rest() == b""
    bodies = [seen.json for seen in scripted.requests]
    assert [body["model"] for body in bodies] == ["m"] * 4
    assert [body.get("stream") for body in bodies] == [None, None, True, None]


@any_split
@given(cuts=st.lists(st.integers(0, 4000), max_size=60), asks=st.booleans())
async def test_any_split_of_a_stream(
    gateway: Gateway, scripted: ScriptedEngine, cuts: list[int], asks: bool
) -> None:
    """The client gets the same events, usage withheld or shown as asked, and the same is counted."""
    raw = STREAM_HEAD + b"".join(chunk(one) for one in EVENTS) + b"0\r\n\r\n"
    scripted.scripts.append(_pieces(raw, cuts))
    before = _counted(gateway)
    answer = await gateway.post({**STREAM, "stream_options": {"include_usage": asks}})
    shown = [one for one in EVENTS if asks or b'"usage"' not in one]
    assert answer.body == b"".join(shown)
    after = _counted(gateway)
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 11, 4, 1]


@any_split
@given(
    cuts=st.lists(st.integers(0, 4000), max_size=40), joins=st.lists(st.integers(1, 9), max_size=9)
)
async def test_any_chunking_of_a_stream(
    gateway: Gateway, scripted: ScriptedEngine, cuts: list[int], joins: list[int]
) -> None:
    """HTTP chunks that do not respect events, nor reads chunks, change nothing."""
    payload = b"".join(EVENTS)
    chunks = b"".join(chunk(piece) for piece in _pieces(payload, [join * 97 for join in joins]))
    scripted.scripts.append(_pieces(STREAM_HEAD + chunks + b"0\r\n\r\n", cuts))
    answer = await gateway.post({**STREAM, "stream_options": {"include_usage": True}})
    assert answer.body == payload


@any_split
@given(
    cuts=st.lists(st.integers(0, 2000), max_size=30),
    framing=st.sampled_from(["sized", "chunked", "closed"]),
)
async def test_any_split_of_a_json_response(
    gateway: Gateway, scripted: ScriptedEngine, cuts: list[int], framing: str
) -> None:
    """Sized, chunked and close-delimited bodies arrive as they are, and their usage is counted."""
    body = {"id": "x", "choices": ["\u00e9" * 40], "usage": USAGE}
    script = json_reply(body, framing=framing)
    raw = b"".join(step for step in script if isinstance(step, bytes))
    scripted.scripts.append([*_pieces(raw, cuts), *([Act.FIN] if framing == "closed" else [])])
    before = _counted(gateway)
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.json) == (200, body)
    after = _counted(gateway)
    assert [new - old for new, old in zip(after, before, strict=True)][:3] == [1, 11, 4]


@any_split
@given(cuts=st.lists(st.integers(0, 2000), max_size=30), bare=st.sampled_from([b"\n", b"\r\n"]))
async def test_any_split_of_a_close_delimited_stream(
    gateway: Gateway, scripted: ScriptedEngine, cuts: list[int], bare: bytes
) -> None:
    """Whatever ends its lines, and with a last event that has no empty line."""
    events = [b"data: 1", b": comment", b"event: x\ndata: 2".replace(b"\n", bare)]
    payload = b"".join(one + 2 * bare for one in events) + b"data: [DONE]"
    raw = head(200, "content-type: text/event-stream", "connection: close") + payload
    scripted.scripts.append([*_pieces(raw, cuts), Act.FIN])
    answer = await gateway.post(STREAM)
    assert (answer.status, answer.body) == (200, payload)


@any_split
@given(cuts=st.lists(st.integers(0, 2000), max_size=30))
async def test_any_split_of_an_error_event(
    gateway: Gateway, scripted: ScriptedEngine, cuts: list[int]
) -> None:
    """The engine's words never pass, wherever the event was cut."""
    broken = b'data: {"error": {"message": "secret", "type": "X", "code": 500}}\n\n'
    first = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
    raw = STREAM_HEAD + chunk(first) + chunk(broken) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    scripted.scripts.append(_pieces(raw, cuts))
    answer = await gateway.post(STREAM)
    assert answer.body.startswith(first)
    assert b"secret" not in answer.body
    assert b'"code":"upstream_error"' in answer.body
    assert answer.body.endswith(b"data: [DONE]\n\n")


@any_split
@given(raw=st.binary(min_size=1, max_size=200))
async def test_any_bytes_as_a_response(
    gateway: Gateway, scripted: ScriptedEngine, raw: bytes
) -> None:
    """Whatever an engine sends in place of HTTP, the client gets an answer of ours."""
    scripted.scripts.append([raw, Act.FIN])
    answer = await gateway.post(CHAT)
    assert answer.status in (502, 503)
    await _healthy_again(gateway)


@any_split
@given(raw=st.binary(min_size=1, max_size=200))
async def test_any_bytes_as_a_request(gateway: Gateway, raw: bytes) -> None:
    """Whatever a client sends, the next one is served."""
    client = await gateway.connect()
    await client.send(raw)
    client.close()
    assert (await gateway.ask(get("/healthz"))).status == 200


@any_split
@given(body=st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
@pytest.mark.parametrize(
    "template", [b"%b", b'{"model":"m","stream":true,%b}', b'{"model":"m","x":%b}']
)
async def test_any_bytes_as_a_body(gateway: Gateway, template: bytes, body: bytes) -> None:
    """A body is either relayed or refused as bad JSON: the worker survives it."""
    answer = await gateway.post(template % body)
    assert answer.status in (200, 400)


async def _healthy_again(gateway: Gateway) -> None:
    assert (await gateway.ask(get("/healthz"))).status == 200


def _counted(gateway: Gateway) -> list[float]:
    """Requests, prompt tokens, completion tokens, streams; off the exposition, parsed once."""
    text = gateway.exposition()
    return [
        sample_sum(text, "headrace_requests_total", code="200"),
        sample_sum(text, "headrace_prompt_tokens_total"),
        sample_sum(text, "headrace_completion_tokens_total"),
        sample_sum(text, "headrace_time_to_first_token_seconds_count"),
    ]
