"""The simulated engine over HTTP, as the OpenAI client and a plain one see it."""

import asyncio
import json
import time
from contextlib import AsyncExitStack

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.engine_sim.options import SimOptions
from benchmarks.engine_sim.server import running

DEADLINE_S = 10.0
INSTANT = {"prefill_tokens_per_s": 0, "decode_tokens_per_s": 0}
HELLO = [{"role": "user", "content": "hello"}]


class Sim:
    """A running engine and its clients."""

    def __init__(self, url, client, http):
        self.url = url
        self.openai = client
        self.http = http

    async def post(self, path, headers=None, **body):
        """One JSON request."""
        return await self.http.post(f"{self.url}{path}", json=body, headers=headers)

    async def chat(self, **fields):
        """One chat request."""
        return await self.post("/v1/chat/completions", messages=HELLO, **fields)

    async def metric(self, name, **labels):
        """Sum of the samples of this name that have these labels."""
        text = (await self.http.get(f"{self.url}/metrics")).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def until(self, name, value):
        """Waits until a metric has a value."""
        end_s = time.monotonic() + DEADLINE_S
        while await self.metric(name) != value:
            assert time.monotonic() < end_s, f"{name} never was {value}"


@pytest.fixture
async def start():
    """Starts engines; options by name."""
    async with AsyncExitStack() as stack:

        async def start_one(**options):
            given = SimOptions(port=0, **{**INSTANT, **options})
            url = await stack.enter_async_context(running(given))
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
            http = httpx.AsyncClient(timeout=DEADLINE_S)
            await stack.enter_async_context(client)
            await stack.enter_async_context(http)
            return Sim(url, client, http)

        yield start_one


async def test_chat(start):
    """A whole chat completion has text, reason and usage."""
    sim = await start()
    answer = await sim.openai.chat.completions.create(
        model="sim-model", messages=HELLO, max_tokens=7
    )
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].message.content) == 28
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


async def test_stream(start):
    """A stream has the role, an event a token, the reason with the last, and usage if asked."""
    sim = await start()
    chunks = [
        chunk
        async for chunk in await sim.openai.chat.completions.create(
            model="sim-model",
            messages=HELLO,
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    *tokens, usage = chunks
    assert [chunk.choices[0].delta.role for chunk in tokens] == ["assistant"] + [None] * 5
    assert [chunk.choices[0].finish_reason for chunk in tokens] == [None] * 5 + ["length"]
    assert (usage.choices, usage.usage.completion_tokens) == ([], 5)
    whole = await sim.openai.chat.completions.create(
        model="sim-model", messages=HELLO, max_tokens=5
    )
    said = "".join(chunk.choices[0].delta.content for chunk in tokens)
    assert said == whole.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1


async def test_answers_end_by_themselves(start):
    """Without a bound an answer stops where a model would; `ignore_eos` goes on to the bound."""
    sim = await start(answer_tokens=9)
    answer = (await sim.chat()).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 9
    answer = (await sim.chat(max_tokens=20, ignore_eos=True)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 20


async def test_choices(start):
    """`n` choices of each prompt, numbered through; they differ."""
    sim = await start()
    answer = await sim.openai.completions.create(
        model="sim-model", prompt=["one", "two"], n=2, max_tokens=6
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    assert answer.usage.completion_tokens == 24
    stream = await sim.openai.chat.completions.create(
        model="sim-model", messages=HELLO, n=2, max_tokens=3, stream=True
    )
    ends = [
        choice.index
        async for chunk in stream
        for choice in chunk.choices
        if choice.finish_reason is not None
    ]
    assert sorted(ends) == [0, 1]


async def test_request_id(start):
    """`x-request-id` beats the body's and becomes the answer's id."""
    sim = await start()
    answer = await sim.chat(max_tokens=1, request_id="body", headers={"x-request-id": "head"})
    assert answer.json()["id"] == "chatcmpl-head"
    answer = await sim.post("/v1/completions", prompt="x", max_tokens=1, request_id="body")
    assert answer.json()["id"] == "cmpl-body"


@pytest.mark.parametrize(
    ("fields", "status", "kind", "param"),
    [
        ({"model": "nobody"}, 404, "NotFoundError", "model"),
        ({"prompt": "x" * 4000}, 400, "BadRequestError", "input_tokens"),
        ({"prompt": "x" * 4000, "stream": True}, 400, "BadRequestError", "input_tokens"),
        ({"max_tokens": 1000}, 400, "BadRequestError", "max_tokens"),
        ({"max_tokens": 0}, 400, "BadRequestError", "max_tokens"),
        ({"max_tokens": "many"}, 400, "Bad Request", "body.max_tokens"),
        ({"n": 0}, 400, "BadRequestError", None),
        ({"stream_options": {"include_usage": True}}, 400, "BadRequestError", "stream_options"),
        ({"no_such_field": 1}, 200, None, None),
    ],
)
async def test_errors(start, fields, status, kind, param):
    """Errors have vLLM's status, shape, type and param; unknown fields are accepted."""
    sim = await start(max_model_len=500, answer_tokens=3)
    answer = await sim.post("/v1/completions", **{"prompt": "x", **fields})
    assert answer.status_code == status
    if kind is not None:
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == (kind, param, status)


async def test_other_refusals(start):
    """What is no JSON, no route or the wrong method."""
    sim = await start()
    broken = await sim.http.post(f"{sim.url}/v1/completions", content=b"{")
    assert broken.status_code == 400
    assert broken.json()["error"]["type"] == "Bad Request"
    assert (await sim.http.get(f"{sim.url}/v1/completions")).status_code == 405
    assert (await sim.http.get(f"{sim.url}/v1/models/sim-model")).status_code == 404


async def test_full_queue(start):
    """Beyond `max_num_queued_reqs` unfinished requests there is 503, and it is counted."""
    sim = await start(max_num_queued_reqs=2, decode_tokens_per_s=1.0)
    async with asyncio.TaskGroup() as tasks:
        held = [tasks.create_task(sim.chat(max_tokens=100)) for _ in range(2)]
        await sim.until("vllm:num_requests_running", 2)
        refused = await sim.chat()
        for one in held:
            one.cancel()
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "Service Unavailable"
    assert await sim.metric("vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1


async def test_client_that_leaves_is_aborted(start):
    """A closed connection frees its place at once, streamed or not, and is counted."""
    sim = await start(decode_tokens_per_s=1.0)
    for number, stream in enumerate((True, False), 1):
        async with asyncio.TaskGroup() as tasks:
            held = tasks.create_task(sim.chat(max_tokens=100, stream=stream))
            await sim.until("vllm:num_requests_running", 1)
            held.cancel()
        await sim.until("vllm:num_requests_running", 0)
        assert await sim.metric("vllm:kv_cache_usage_perc") == 0
        aborted = await sim.metric("vllm:request_success_total", finished_reason="abort")
        assert aborted == number


async def test_latency_is_real_time(start):
    """First token and the following come when the latency model says."""
    sim = await start(prefill_tokens_per_s=1000, decode_tokens_per_s=100)
    begun_s = time.monotonic()
    stream = await sim.openai.completions.create(
        model="sim-model", prompt="x" * 400, max_tokens=11, stream=True
    )
    times_s = [time.monotonic() - begun_s async for _ in stream]
    assert times_s[0] >= 0.1
    assert 0.09 <= times_s[-1] - times_s[0] < 0.5
    assert await sim.metric("vllm:time_to_first_token_seconds_sum") == pytest.approx(0.1)
    assert await sim.metric("vllm:inter_token_latency_seconds_sum") == pytest.approx(0.1)


async def test_prefix_cache_is_seen_in_the_metrics(start):
    """The second of two equal prompts is a hit, but not with another salt."""
    sim = await start()
    for salt in (None, None, "s"):
        extra = {} if salt is None else {"cache_salt": salt}
        await sim.post("/v1/completions", prompt="word " * 160, max_tokens=1, **extra)
    assert await sim.metric("vllm:prefix_cache_queries_total") == 600
    assert await sim.metric("vllm:prefix_cache_hits_total") == 192
    assert await sim.metric("vllm:prompt_tokens_total") == 600
    assert await sim.metric("vllm:prompt_tokens_cached_total") == 192


async def test_tokenize_and_back(start):
    """Tokens of a text and of a conversation, and their text again."""
    sim = await start()
    told = (await sim.post("/tokenize", prompt="hello wörld")).json()
    assert told["count"] == len(told["tokens"]) == 3
    assert told["max_model_len"] == 8192
    assert (await sim.post("/detokenize", tokens=told["tokens"])).json() == {
        "prompt": "hello wörld"
    }
    chat = (await sim.post("/tokenize", messages=HELLO)).json()
    answer = (await sim.chat(max_tokens=1)).json()
    assert answer["usage"]["prompt_tokens"] == chat["count"]
    assert (await sim.post("/detokenize", tokens=[2**40])).status_code == 400


async def test_pages(start):
    """Health, version, load, routes and models are as vLLM has them."""
    sim = await start(adapters={"la": "/adapters/la"})
    assert (await sim.http.get(f"{sim.url}/health")).content == b""
    assert (await sim.http.get(f"{sim.url}/version")).json() == {"version": "0.32.0"}
    assert (await sim.http.get(f"{sim.url}/load")).json() == {"server_load": 0}
    assert (await sim.http.get(f"{sim.url}/kv_event_sources")).json() == {}
    paths = (await sim.http.get(f"{sim.url}/openapi.json")).json()["paths"]
    assert {"/v1/chat/completions", "/v1/load_lora_adapter", "/health"} <= paths.keys()
    models = {model.id: model async for model in sim.openai.models.list()}
    assert (models["la"].parent, models["la"].root) == ("sim-model", "/adapters/la")
    assert models["sim-model"].max_model_len == 8192


async def test_adapters(start, tmp_path):
    """An adapter can be loaded, answers by its name, is unloaded; errors have vLLM's texts."""
    sim = await start()
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    told = await sim.post(load, lora_name="la", lora_path=str(tmp_path))
    assert (told.status_code, told.text) == (
        200,
        "Success: LoRA adapter 'la' added successfully.",
    )
    again = await sim.post(load, lora_name="la", lora_path=str(tmp_path))
    assert again.status_code == 400
    assert again.json()["error"]["type"] == "InvalidUserInput"
    assert "already been loaded" in again.json()["error"]["message"]
    base = await sim.post(load, lora_name="sim-model", lora_path=str(tmp_path))
    assert "conflicts with a served base model" in base.json()["error"]["message"]
    lost = await sim.post(load, lora_name="lb", lora_path=str(tmp_path / "none"))
    assert (lost.status_code, lost.json()["error"]["type"]) == (404, "NotFoundError")
    answer = (await sim.chat(model="la", max_tokens=4)).json()
    assert answer["model"] == "la"
    assert answer["choices"][0]["message"]["content"].startswith("la")
    gone = await sim.post(unload, lora_name="la")
    assert gone.text == "Success: LoRA adapter 'la' removed successfully."
    assert (await sim.post(unload, lora_name="la")).status_code == 404
    assert (await sim.chat(model="la")).status_code == 404


async def test_unloading_does_not_touch_requests_in_flight(start):
    """Who is being answered by an adapter is answered to the end."""
    sim = await start(adapters={"la": "/la"}, decode_tokens_per_s=100)
    async with asyncio.TaskGroup() as tasks:
        held = tasks.create_task(sim.chat(model="la", max_tokens=30))
        await sim.until("vllm:num_requests_running", 1)
        gone = await sim.post("/v1/unload_lora_adapter", lora_name="la")
        assert gone.status_code == 200
        assert not held.done()
    assert held.result().json()["usage"]["completion_tokens"] == 30


async def test_active_adapters_are_in_the_metrics(start):
    """The newest sample names every adapter that runs; older sets of labels stay, as in vLLM."""
    sim = await start(adapters={"la": "/la", "lb": "/lb"}, decode_tokens_per_s=1.0)
    async with asyncio.TaskGroup() as tasks:
        held = [tasks.create_task(sim.chat(model=name, max_tokens=100)) for name in ("la", "lb")]
        await sim.until("vllm:num_requests_running", 2)
        text = (await sim.http.get(f"{sim.url}/metrics")).text
        for one in held:
            one.cancel()
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.name == "vllm:lora_requests_info"
    ]
    newest = max(samples, key=lambda sample: sample.value)
    assert newest.labels["running_lora_adapters"] == "la,lb"
    assert newest.labels["waiting_lora_adapters"] == "la,lb"
    assert len(samples) > 1


async def test_pipelined_requests_are_answered_in_order(start):
    """Requests sent behind each other on one connection get their answers in that order."""
    sim = await start(decode_tokens_per_s=100)
    host, _, port = sim.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"prompt": "x", "max_tokens": 3}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" % len(body)
    for number in range(3):
        writer.write(head + b"x-request-id: r%d\r\n\r\n%b" % (number, body))
    got = b""
    async with asyncio.timeout(DEADLINE_S):
        while got.count(b'"metrics":null}') < 3:
            got += await reader.read(65_536)
    places = [got.index(b'"id":"cmpl-r%d"' % number) for number in range(3)]
    assert places == sorted(places)
    writer.close()
    await writer.wait_closed()
