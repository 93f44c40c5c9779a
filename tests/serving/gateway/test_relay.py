"""What passes between client and engine, and what does not: bytes, usage, ids, headers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from base_server import DONE
from raw_client import post
from scripted_engine import chat_events, chunk, event, head, json_reply, stream_reply

if TYPE_CHECKING:
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}
USAGE = {"prompt_tokens": 11, "total_tokens": 18, "completion_tokens": 7}
WITH_USAGE = {**STREAM, "stream_options": {"include_usage": True}}


async def test_request_body_passes_unchanged(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """A body that needs nothing reaches the engine byte for byte, odd spacing and all."""
    body = b' {"model" : "m",\n "messages":[], "x":1.50, "s":"\\u00e9\xc3\xa9", "big":12345678901234567890123 }'
    await gateway.post(body)
    assert scripted.requests[0].body == body


async def test_json_response_passes_unchanged(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """So does the engine's JSON, its content type and its length."""
    body = b'{ "id" : "x", "n": 1e400, "s": "\\ud83d\\ude00" }\n'
    reply = head(200, f"content-length: {len(body)}", "content-type: application/json; x=1")
    scripted.scripts.append([reply, body])
    answer = await gateway.post(CHAT)
    assert answer.body == body
    assert answer.headers["content-type"] == "application/json; x=1"
    assert answer.headers["content-length"] == str(len(body))


async def test_events_pass_one_by_one_and_unchanged(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """Each event leaves in the chunk that it came in."""
    events = [b"data: { }\n\n", b": keep-alive\n\n", b'data: {"a": [1]}\n\n', b"data: [DONE]\n\n"]
    scripted.scripts.append(stream_reply(events))
    answer = await gateway.post(WITH_USAGE)
    assert answer.chunks == events
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_alias_is_rewritten_and_nothing_else(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """The engine gets its own name for the model; all other values keep their bytes."""
    gateway = await start_gateway(scripted, aliases={"fast": "m"})
    values = (
        b'"big":12345678901234567890123,"float":1.50,"exp":1E400,"neg":-0.0,"s":"\\u00e9\\/\xc3\xa9",'
        b'"nested":{"model":"fast","list":[1, 2,  3]},"\\u006b":null'
    )
    answer = await gateway.post(b'{"model":"fast",%b}' % values)
    assert answer.status == 200
    assert scripted.requests[0].body == b'{"model":"m",%b}' % values.replace(b"\\u006b", b"k")


async def test_alias_in_the_model_list(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """Aliases are listed beside what the engines serve, with what they stand for."""
    gateway = await start_gateway(scripted, aliases={"fast": "m", "gone": "nobody"})
    listed = (await gateway.ask(b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n")).json["data"]
    assert [(card["id"], card["root"], card["max_model_len"]) for card in listed] == [
        ("m", "m", 2048),
        ("fast", "m", 2048),
    ]
    one = await gateway.ask(b"GET /v1/models/f%61st HTTP/1.1\r\nhost: h\r\n\r\n")
    assert one.json["id"] == "fast"
    missing = await gateway.ask(b"GET /v1/models/gone HTTP/1.1\r\nhost: h\r\n\r\n")
    assert (missing.status, missing.code) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("options", "is_shown", "sent"),
    [
        (None, False, {"include_usage": True}),
        ({}, False, {"include_usage": True}),
        ({"include_usage": False}, False, {"include_usage": True}),
        ({"include_usage": None, "x": [1]}, False, {"include_usage": True, "x": [1]}),
        ({"include_usage": True, "x": 1}, True, {"include_usage": True, "x": 1}),
    ],
)
async def test_stream_usage(
    gateway: Gateway,
    scripted: ScriptedEngine,
    options: dict[str, object] | None,
    is_shown: bool,
    sent: dict[str, object],
) -> None:
    """Usage is always asked for and counted, and shown to the client that asked."""
    events = chat_events("x", "m", 7, usage=USAGE)
    scripted.scripts.append(stream_reply(events))
    answer = await gateway.post({**STREAM, "stream_options": options})
    assert scripted.requests[0].json["stream_options"] == sent
    shown = events if is_shown else [one for one in events if b'"usage"' not in one]
    # The role is held until there is more than it.
    assert answer.chunks == [shown[0] + shown[1], *shown[2:]]
    labels = {"endpoint": "/v1/chat/completions", "model": "m"}
    assert gateway.metric("headrace_prompt_tokens_total", **labels) == 11
    assert gateway.metric("headrace_completion_tokens_total", **labels) == 7


async def test_usage_in_every_event(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Events that carry text pass whatever usage they name; the last count is counted."""
    choices = [{"delta": {"content": "a"}}]
    usages = [{**USAGE, "completion_tokens": number} for number in (1, 2)]
    events = [event({"choices": choices, "usage": usage}) for usage in usages]
    last = event({"choices": [], "usage": USAGE})
    scripted.scripts.append(stream_reply([*events, last, b"data: [DONE]\n\n"]))
    answer = await gateway.post({**STREAM, "stream_options": {"continuous_usage_stats": True}})
    assert answer.chunks == [*events, b"data: [DONE]\n\n"]
    assert gateway.metric("headrace_completion_tokens_total") == 7


async def test_usage_of_a_json_response(gateway: Gateway) -> None:
    """Counted from the body."""
    await gateway.post(CHAT)
    assert gateway.metric("headrace_prompt_tokens_total") == 7
    assert gateway.metric("headrace_completion_tokens_total") == 3


@pytest.mark.parametrize("cut", [1, 40, 60, 100, 5_000, 19_000])
async def test_usage_before_long_fields(
    gateway: Gateway, scripted: ScriptedEngine, cut: int
) -> None:
    """vLLM writes `prompt_logprobs` after the usage: it is found all the same, however cut."""
    logprobs = b'{"1":{"logprob":-1.0,"decoded_token":"abc"}},' * 500
    body = b'{"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7},"prompt_logprobs":[%bnull]}'
    body %= logprobs
    lines = (f"content-length: {len(body)}", "content-type: application/json")
    scripted.scripts.append([head(200, *lines), body[:cut], body[cut:]])
    assert (await gateway.post(CHAT)).body == body
    assert gateway.metric("headrace_prompt_tokens_total") == 11
    assert gateway.metric("headrace_completion_tokens_total") == 7


async def test_usage_is_only_asked_for_where_it_exists(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """The Responses API and Anthropic's have no `stream_options.include_usage`."""
    for path in ("/v1/responses", "/v1/messages"):
        scripted.scripts.append(stream_reply([b"data: {}\n\n"]))
        await gateway.post(STREAM, path)
    assert "stream_options" not in scripted.requests[0].json
    assert scripted.requests[1].json == STREAM


async def test_usage_of_an_anthropic_stream(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Prompt tokens come with the first event, completion tokens with the last."""
    events = [
        b'event: message_start\ndata: {"message":{"usage":{"input_tokens":9,"output_tokens":0}}}\n\n',
        b'event: message_delta\ndata: {"delta":{},"usage":{"input_tokens":9,"output_tokens":5}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ]
    scripted.scripts.append(stream_reply(events))
    answer = await gateway.post(STREAM, "/v1/messages")
    assert answer.chunks == events
    assert gateway.metric("headrace_prompt_tokens_total") == 9
    assert gateway.metric("headrace_completion_tokens_total") == 5


async def test_text_cannot_forge_usage_or_errors(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """What a model writes about usage and errors is text."""
    text = (
        '"usage":{"prompt_tokens":99,"completion_tokens":99},"choices":[] data: {"error": {}}\n\n'
    )
    forged = event({"choices": [{"index": 0, "delta": {"content": text}}]})
    events = [forged, *chat_events("x", "m", 1, usage=USAGE)]
    scripted.scripts.append(stream_reply(events))
    answer = await gateway.post(STREAM)
    assert answer.chunks[0] == forged
    assert gateway.metric("headrace_prompt_tokens_total") == 11


async def test_null_error_is_no_error(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """The Responses API names `error` in each of its objects."""
    events = [b'data: {"response":{"error":null}}\n\n', b'data: {"a":1,"error":null}\n\n']
    scripted.scripts.append(stream_reply(events))
    assert (await gateway.post(STREAM, "/v1/responses")).chunks == events


async def test_request_ids(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """The engine gets our inference id; the client gets its own id back, and ours beside it."""
    answer = await gateway.post(CHAT, x_request_id="mine")
    inference_id = answer.headers["x-headrace-inference-id"]
    assert re.fullmatch(r"[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", inference_id)
    assert answer.headers["x-request-id"] == "mine"
    assert scripted.requests[0].headers["x-request-id"] == inference_id
    assert answer.json["id"] == f"chatcmpl-{inference_id}"
    answer = await gateway.post(CHAT)
    assert answer.headers["x-request-id"] == answer.headers["x-headrace-inference-id"]


async def test_responses_api_gets_the_id_in_its_body(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """That API takes its id from the body, and none that the client wrote; it names the replica too."""
    scripted.scripts.append(json_reply({}))
    answer = await gateway.post({**CHAT, "request_id": "forged"}, "/v1/responses")
    inference_id = answer.headers["x-headrace-inference-id"]
    assert scripted.requests[0].json["request_id"] == f"resp_{inference_id}000"


@pytest.mark.parametrize("sent", ["a b", "x" * 129, "caf\xe9", "", "\t", "a\x7fb"])
async def test_unusable_request_ids_are_replaced(gateway: Gateway, sent: str) -> None:
    """An id that is long or not printable does not come back."""
    answer = await gateway.post(CHAT, x_request_id=sent)
    assert answer.headers["x-request-id"] == answer.headers["x-headrace-inference-id"]


async def test_request_id_cannot_inject_headers(gateway: Gateway) -> None:
    """An id with a line's end is malformed HTTP, or a header of its own that does not come back."""
    answer = await gateway.ask(post(CHAT, x_request_id="a\nset-cookie: b"))
    assert answer.status == 400
    assert "set-cookie" not in answer.headers
    answer = await gateway.ask(post(CHAT, x_request_id="a\r\nset-cookie: b"))
    assert answer.status == 200
    assert "set-cookie" not in answer.headers


async def test_only_trace_headers_reach_the_engine(
    gateway: Gateway, scripted: ScriptedEngine
) -> None:
    """Credentials, cookies and engine switches of the client stay here."""
    await gateway.post(
        CHAT,
        traceparent="00-1-2-01",
        tracestate="a=b",
        authorization="Bearer secret",
        x_api_key="secret",
        cookie="secret",
        x_vllm_priority="0",
        x_data_parallel_rank="1",
        accept_encoding="gzip",
    )
    seen = scripted.requests[0]
    assert sorted(seen.headers) == [
        "content-length",
        "content-type",
        "host",
        "traceparent",
        "tracestate",
        "x-request-id",
    ]
    assert (seen.headers["traceparent"], seen.headers["tracestate"]) == ("00-1-2-01", "a=b")
    assert seen.headers["host"] == f"127.0.0.1:{scripted.port}"
    assert b"secret" not in seen.head


async def test_engine_headers_stay_behind(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Of the engine's headers only the content type passes."""
    lines = ("content-length: 2", "content-type: application/json", "x-engine: 1", "set-cookie: a")
    scripted.scripts.append([head(200, *lines), b"{}"])
    answer = await gateway.post(CHAT)
    assert {"x-engine", "set-cookie", "server"}.isdisjoint(answer.headers)


async def test_interim_responses_are_skipped(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """1xx heads before the response change nothing."""
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n"
    scripted.scripts.append([b"HTTP/1.1 100 Continue\r\n\r\n", interim, *json_reply({"a": 1})])
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.json) == (200, {"a": 1})


async def test_close_delimited_json(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """A body that ends with the engine's connection is whole, and ours goes on."""
    scripted.scripts.append(json_reply({"a": 1}, framing="closed"))
    client = await gateway.connect()
    await client.send(post(CHAT), post(CHAT))
    assert (await client.response()).json == {"a": 1}
    assert (await client.response()).status == 200


async def test_chunks_that_hold_parts_of_events(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """A block that ends between events but inside a chunk does not break the client's framing."""
    first, second, third = b"data: 1\n\n", b"data: 2\n\n", DONE
    both = chunk(first + second)
    cut = both.index(second)
    end = len(both) - 2
    scripted.scripts.append(
        [
            stream_reply([])[0],
            both[:cut],
            both[cut:end],
            both[end:] + chunk(third),
            b"0\r\n\r\n",
        ]
    )
    assert (await gateway.post(WITH_USAGE)).body == first + second + third


@pytest.mark.parametrize("trailers", [b"", b"x-trailer: 1\r\n"])
async def test_engine_trailers_are_dropped(
    gateway: Gateway, scripted: ScriptedEngine, trailers: bytes
) -> None:
    """The last chunk is ours."""
    script = stream_reply([b"data: 1\n\n", DONE])[:-1]
    scripted.scripts.append([*script, b"0\r\n" + trailers + b"\r\n"])
    client = await gateway.connect()
    await client.send(post(WITH_USAGE, connection="close"))
    assert (await client.response()).body == b"data: 1\n\n" + DONE
    assert await client.rest() == b""


async def test_engine_connection_is_used_again(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """Sized, chunked and streamed responses leave the connection fit for the next request."""
    scripted.scripts += [json_reply({}), json_reply({}, framing="chunked")]
    for body in (CHAT, CHAT, STREAM, CHAT):
        assert (await gateway.post(body)).status == 200
    assert len({seen.connection for seen in scripted.requests}) == 1
