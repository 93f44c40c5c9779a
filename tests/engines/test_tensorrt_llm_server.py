"""The simulated TensorRT-LLM has the habits that its reference describes."""

import asyncio
import json

import httpx
import pytest
from eventually import eventually
from prometheus_client.parser import text_string_to_metric_families


def lora(name="support", number=1, path="/adapters/support"):
    """What selects an adapter."""
    return {"lora_name": name, "lora_int_id": number, "lora_path": path}


def text_of(answer):
    """What the model said."""
    return answer.json()["choices"][0]["message"]["content"]


def gauge(text, name):
    """One sample of an exposition."""
    return next(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )


@pytest.mark.parametrize(
    "field", ["rid", "request_id", "priority", "min_tokens_x", "prompt_cache_key", "store"]
)
async def test_unknown_field_is_400(start_tensorrt_llm, chat, field):
    """Any field outside the schema is refused, with a string for an error."""
    answer = await chat(await start_tensorrt_llm(), **{field: "x"})
    assert answer.status_code == 400
    assert field in answer.json()["error"]


async def test_nested_unknown_field_is_400(start_tensorrt_llm, chat):
    """`stream_options` and `lora_request` are as strict."""
    server = await start_tensorrt_llm()
    answer = await chat(server, stream=True, stream_options={"include": 1})
    assert answer.status_code == 400
    assert (await chat(server, lora_request={**lora(), "rank": 8})).status_code == 400


async def test_model_is_not_checked(start_tensorrt_llm, chat):
    """Every name is answered by the base."""
    server = await start_tensorrt_llm()
    assert text_of(await chat(server, model="support")).split()[0] == "m"


async def test_adapter_cache_knows_ids_only(start_tensorrt_llm, chat):
    """The same id with a new path is answered by the old weights; a new id by the new ones."""
    server = await start_tensorrt_llm()
    first = await chat(server, lora_request=lora())
    assert text_of(first).startswith("support from /adapters/support")
    stale = await chat(server, lora_request=lora(path="/adapters/support-v2"))
    assert text_of(stale) == text_of(first)
    fresh = await chat(server, lora_request=lora(number=2, path="/adapters/support-v2"))
    assert text_of(fresh).startswith("support from /adapters/support-v2")


async def test_adapters_are_never_listed(start_tensorrt_llm, chat, client):
    """`/v1/models` has the base only, with four fields."""
    server = await start_tensorrt_llm()
    await chat(server, lora_request=lora())
    cards = (await client.get(f"{server.url}/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["m"]
    assert set(cards[0]) == {"id", "object", "created", "owned_by"}


async def test_adapter_problems_are_400(start_tensorrt_llm, chat):
    """A path that it does not have, and weights that do not load."""
    server = await start_tensorrt_llm(lora_paths=frozenset({"/adapters/support"}))
    assert (await chat(server, lora_request=lora(path="/elsewhere"))).status_code == 400
    server.set(lora_load_fails=True)
    failed = await chat(server, lora_request=lora())
    assert failed.status_code == 400
    assert failed.json()["message"] == "Failed to load LoRA adapter"
    deaf = await start_tensorrt_llm(has_lora=False)
    assert text_of(await chat(deaf, lora_request=lora())).split()[0] == "m"


async def test_every_failure_is_400(start_tensorrt_llm, chat):
    """An internal error is a flat 400 too, and so is a prompt that is too long."""
    server = await start_tensorrt_llm(fail_after_tokens=1, max_seq_len=50)
    answer = await chat(server)
    assert answer.status_code == 400
    assert answer.json()["type"] == "BadRequestError"
    long = await chat(server, messages=[{"role": "user", "content": "x " * 60}])
    assert long.status_code == 400


async def test_stream_that_fails_just_ends(start_tensorrt_llm, client):
    """No error event, no `[DONE]`, no end of the body: the connection closes."""
    server = await start_tensorrt_llm(fail_after_tokens=2)
    body = {"model": "m", "prompt": "hi", "stream": True}
    got = b""

    async def read(answer):
        nonlocal got
        async for piece in answer.aiter_bytes():
            got += piece

    async with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            await read(answer)
    assert got.count(b"data: ") == 2
    assert b"error" not in got
    assert b"[DONE]" not in got


async def test_chunks(start_tensorrt_llm, chat):
    """Each chunk has an id of its own, and the first one a space before its empty line."""
    answer = await chat(await start_tensorrt_llm(), stream=True)
    first, *_ = answer.text.partition("data: ")[2].split("\n\n")
    assert first.endswith("} ")
    parts = [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
    chunks = [json.loads(part) for part in parts[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == len(chunks) == 6
    assert parts[-1] == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize(
    ("options", "has_usage"), [({}, True), ({"include_usage": False}, False), (None, False)]
)
async def test_usage_is_on_by_default(start_tensorrt_llm, chat, options, has_usage):
    """`stream_options`, even empty, brings the usage chunk."""
    extra = {} if options is None else {"stream_options": options}
    answer = await chat(await start_tensorrt_llm(), stream=True, **extra)
    assert ('"choices":[],"usage":{' in answer.text) is has_usage


async def test_continuous_usage_of_old_releases(start_tensorrt_llm, chat):
    """Old releases put usage into every chunk."""
    server = await start_tensorrt_llm(continuous_usage_default=True)
    answer = await chat(server, stream=True, stream_options={})
    assert answer.text.count('"usage":{') == 7


async def test_metrics_are_drained(start_tensorrt_llm, chat, client):
    """`/metrics` is JSON, and gone once read; Prometheus has another path, by configuration."""
    server = await start_tensorrt_llm()
    await chat(server)
    assert len((await client.get(f"{server.url}/metrics")).json()) == 1
    assert (await client.get(f"{server.url}/metrics")).json() == []
    assert (await client.get(f"{server.url}/prometheus/metrics")).status_code == 404


async def test_gauges_go_stale(start_tensorrt_llm, chat, client):
    """Gauges move only when a request completes, and stay where that left them."""
    server = await start_tensorrt_llm(return_perf_metrics=True)
    url = f"{server.url}/prometheus/metrics"
    await chat(server)
    assert server.batch.running == []
    text = (await client.get(url)).text
    assert gauge(text, "trtllm_num_requests_running") == 1
    assert gauge(text, "trtllm_prompt_tokens_total") == 3
    server.set(token_interval_s=60.0)
    async with asyncio.TaskGroup() as tasks:
        held = [tasks.create_task(chat(server)) for _ in range(3)]
        await eventually(lambda: server.counts.running == 3)
        assert gauge((await client.get(url)).text, "trtllm_num_requests_running") == 1
        for one in held:
            one.cancel()


async def test_kv_events_are_drained(start_tensorrt_llm, chat, client):
    """KV events are off by default; switched on, whoever reads them takes them away."""
    prompt = [{"role": "user", "content": " ".join(f"word{n}" for n in range(70))}]
    off, server = await start_tensorrt_llm(), await start_tensorrt_llm(event_buffer_max_size=10)
    for one in (off, server):
        await chat(one, messages=prompt)
    assert (await client.post(f"{off.url}/kv_cache_events")).json() == []
    created, stored = (await client.post(f"{server.url}/kv_cache_events")).json()
    assert created["data"]["type"] == "created"
    assert len(stored["data"]["blocks"]) == 2
    assert (await client.post(f"{server.url}/kv_cache_events")).json() == []


async def test_health(start_tensorrt_llm, client):
    """Health follows the executor."""
    server = await start_tensorrt_llm()
    assert (await client.get(f"{server.url}/health")).status_code == 200
    server.set(is_healthy=False)
    paths = ("health", "health_generate")
    statuses = [(await client.get(f"{server.url}/{path}")).status_code for path in paths]
    assert statuses == [503, 500]


async def test_responses(start_tensorrt_llm, client):
    """Responses can be read and deleted again."""
    server = await start_tensorrt_llm()
    url = f"{server.url}/v1/responses"
    made = (await client.post(url, json={"model": "m", "input": "hi"})).json()
    assert (await client.get(f"{url}/{made['id']}")).json() == made
    assert (await client.delete(f"{url}/{made['id']}")).json()["deleted"]
    assert (await client.get(f"{url}/{made['id']}")).status_code == 404


async def test_response_is_called_by_the_request_id(start_tensorrt_llm, client):
    """The one place where it takes an id; a response goes on from another by it, if that is kept."""
    server = await start_tensorrt_llm()
    url = f"{server.url}/v1/responses"
    asked = {"model": "m", "input": "hi", "request_id": "resp_1"}
    assert (await client.post(url, json=asked)).json()["id"] == "resp_1"
    statuses = [
        (await client.post(url, json={**asked, "previous_response_id": before})).status_code
        for before in ("resp_1", "resp_2")
    ]
    assert statuses == [200, 404]


async def test_client_that_leaves_is_noticed_late(start_tensorrt_llm):
    """It looks only once in a while whether the client is still there."""
    server = await start_tensorrt_llm(token_interval_s=60.0, disconnect_s=0.3)
    body = {"model": "m", "prompt": "hi"}
    async with httpx.AsyncClient(timeout=0.1) as hasty:
        with pytest.raises(httpx.ReadTimeout):
            await hasty.post(f"{server.url}/v1/completions", json=body)
    assert (server.counts.running, server.counts.aborts) == (1, 0)
    await eventually(lambda: server.counts.running == 0)
    assert server.counts.aborts == 1


async def test_logprobs_follow_the_files_where_it_gives_any(start_tensorrt_llm, client, tmp_path):
    """The weights are read when their number is first seen; logprobs only where it gives them."""
    (tmp_path / "adapter").write_text("one")
    body = {"model": "m", "prompt": ["hello", "you"], "max_tokens": 5, "logprobs": 2}
    body["lora_request"] = lora(path=str(tmp_path))
    server = await start_tensorrt_llm(gives_logprobs=True)
    url = f"{server.url}/v1/completions"
    first = (await client.post(url, json=body)).json()["choices"]
    assert [len(choice["logprobs"]["top_logprobs"][0]) for choice in first] == [2, 2]
    (tmp_path / "adapter").write_text("two")
    assert (await client.post(url, json=body)).json()["choices"] == first
    body["lora_request"] = lora(number=2, path=str(tmp_path))
    assert (await client.post(url, json=body)).json()["choices"] != first
    server.set(gives_logprobs=False)
    texts = (await client.post(url, json=body)).json()["choices"]
    assert [choice["logprobs"] for choice in texts] == [None, None]
    assert texts[0]["text"] != texts[1]["text"]
