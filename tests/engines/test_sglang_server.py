"""The simulated SGLang has the habits that its reference describes."""

import asyncio
import json

import anthropic
import httpx
import pytest
from eventually import eventually


def events_of(answer):
    """The data of a stream's events."""
    return [part.partition("data: ")[2] for part in answer.text.split("\n\n") if part]


def text_of(answer):
    """What the model said."""
    return answer.json()["choices"][0]["message"]["content"]


def rid_of(server, number=-1):
    """The id that a request was sent with."""
    return server.requests[number].json["rid"]


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({"model": "m"}, "m"),
        ({"model": "nothing-of-the-kind"}, "m"),
        ({"model": "support"}, "m"),
        ({"model": "m:support"}, "support"),
        ({"model": "whatever:legal"}, "legal"),
        ({"lora_path": "legal"}, "legal"),
        ({"model": "m:support", "lora_path": "legal"}, "support"),
    ],
)
async def test_naming(start_sglang, chat, fields, weights):
    """`base:adapter` selects and beats `lora_path`; a bare or unknown name is the base, silently."""
    answer = await chat(await start_sglang(), **fields)
    assert answer.status_code == 200
    assert text_of(answer).split()[0] == weights


async def test_adapter_that_was_never_loaded_is_400(start_sglang, chat):
    """Only a name behind a ':' that nobody ever loaded is refused, with a flat error."""
    answer = await chat(await start_sglang(), model="m:nobody", stream=True)
    assert answer.status_code == 400
    assert answer.json()["object"] == "error"
    assert "are not loaded: nobody" in answer.json()["message"]


async def test_unknown_fields_are_ignored(start_sglang, chat):
    """Whatever else is in the body does not matter."""
    assert (await chat(await start_sglang(), no_such_field=1)).status_code == 200


async def test_full_queue(start_sglang, chat):
    """A full queue is 503 for a whole answer, and 200 with an error event for a stream."""
    server = await start_sglang(
        max_running_requests=1, max_queued_requests=1, token_interval_s=60.0
    )
    async with asyncio.TaskGroup() as tasks:
        held = [tasks.create_task(chat(server)) for _ in range(2)]
        await eventually(lambda: server.counts.running == 2)
        whole = await chat(server)
        assert whole.status_code == 503
        assert whole.json()["type"] == "503"
        assert whole.json()["message"] == "The request queue is full."
        streamed = await chat(server, stream=True)
        assert streamed.status_code == 200
        first, done = events_of(streamed)
        error = json.loads(first)["error"]
        assert (error["type"], error["code"]) == ("SERVICE_UNAVAILABLE", 503)
        assert done == "[DONE]"
        for one in held:
            one.cancel()


async def test_rid_is_the_response_id_and_cannot_be_used_twice(start_sglang, chat):
    """`rid` comes back as `id` in every chunk; while it is in flight another one is a 400."""
    server = await start_sglang()
    answer = await chat(server, rid="abc", stream=True)
    assert {json.loads(one)["id"] for one in events_of(answer)[:-1]} == {"abc"}
    server.set(token_interval_s=60.0)
    async with asyncio.TaskGroup() as tasks:
        held = tasks.create_task(chat(server, rid="abc"))
        await eventually(lambda: server.counts.running == 1)
        assert (await chat(server, rid="abc")).status_code == 400
        held.cancel()


async def test_abort_takes_all_ids_that_begin_so(start_sglang, chat, client):
    """`/abort_request` ends every request whose id begins with the given one, as a success."""
    server = await start_sglang(token_interval_s=0.05, num_tokens=100)
    async with asyncio.TaskGroup() as tasks:
        held = [tasks.create_task(chat(server, rid=rid)) for rid in ("r-1", "r-10", "q")]
        await eventually(lambda: server.counts.running == 3)
        await client.post(f"{server.url}/abort_request", json={"rid": "r-1"})
        answers = [await one for one in held[:2]]
        held[2].cancel()
    assert [one.status_code for one in answers] == [200, 200]
    assert {one.json()["choices"][0]["finish_reason"] for one in answers} == {"abort"}


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_graceful_abort_looks_like_a_success(start_sglang, chat, num_tokens):
    """What the engine aborts by itself is a 200 with its own finish reason, even before any text."""
    server = await start_sglang(abort_after_tokens=num_tokens)
    whole = (await chat(server)).json()
    assert whole["choices"][0]["finish_reason"] == "abort"
    assert whole["usage"]["completion_tokens"] == num_tokens
    streamed = await chat(server, stream=True)
    assert streamed.status_code == 200
    last = json.loads(events_of(streamed)[-2])
    assert last["choices"][0]["finish_reason"] == "abort"


async def test_unload_waits_and_does_not_revoke(start_sglang, chat, client):
    """Unloading blocks until the last request ends; the next one loads the adapter again."""
    server = await start_sglang(token_interval_s=0.02)
    async with asyncio.TaskGroup() as tasks:
        held = tasks.create_task(chat(server, model="m:support"))
        await eventually(lambda: server.counts.running == 1)
        body = {"lora_name": "support"}
        unloading = tasks.create_task(client.post(f"{server.url}/unload_lora_adapter", json=body))
        await eventually(lambda: "support" not in server.loras.loaded)
        assert not unloading.done()
        assert (await held).status_code == 200
        told = (await unloading).json()
    assert told["success"]
    assert told["loaded_adapters"] == {"legal": "/adapters/legal"}
    answer = await chat(server, model="m:support")
    assert text_of(answer).startswith("support from /adapters/support")
    assert "support" in server.loras.loaded


async def test_load(start_sglang, chat, client):
    """Loading makes an adapter known and listed; loading it again, even elsewhere, is a 400."""
    server = await start_sglang()
    body = {"lora_name": "new", "lora_path": "/adapters/new"}
    told = await client.post(f"{server.url}/load_lora_adapter", json=body)
    assert told.json()["loaded_adapters"]["new"] == "/adapters/new"
    again = await client.post(f"{server.url}/load_lora_adapter", json=body)
    assert again.status_code == 400
    assert not again.json()["success"]
    cards = (await client.get(f"{server.url}/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards][-1] == ("new", "m")
    one = await client.get(f"{server.url}/v1/models/new")
    assert one.status_code == 404
    assert one.json()["error"]["code"] == "model_not_found"


async def test_loading_with_data_parallelism_is_500(start_sglang, client):
    """With `dp_size` over 1 loading trips over an assertion."""
    server = await start_sglang(dp_size=2)
    body = {"lora_name": "new", "lora_path": "/adapters/new"}
    answer = await client.post(f"{server.url}/load_lora_adapter", json=body)
    assert answer.status_code == 500


async def test_higher_priority_first(start_sglang, chat):
    """Of those that wait, the highest `priority` is served first."""
    server = await start_sglang(
        max_running_requests=1, enable_priority_scheduling=True, token_interval_s=0.01
    )
    ended = []

    async def ask(priority):
        await chat(server, priority=priority)
        ended.append(priority)

    async with asyncio.TaskGroup() as tasks:
        for number, priority in enumerate((5, 1, 9)):
            tasks.create_task(ask(priority))
            await eventually(lambda number=number: server.counts.running == number + 1)
    assert ended == [5, 9, 1]


async def test_higher_priority_evicts_from_a_full_queue(start_sglang, chat):
    """A newcomer that matters more takes a waiting one's place, which gets the full queue's error."""
    server = await start_sglang(
        max_running_requests=1,
        max_queued_requests=1,
        enable_priority_scheduling=True,
        token_interval_s=0.05,
    )
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(chat(server, priority=5))
        await eventually(lambda: len(server.batch.running) == 1)
        evicted = tasks.create_task(chat(server, priority=1))
        await eventually(lambda: len(server.batch.waiting) == 1)
        newcomer = tasks.create_task(chat(server, priority=9))
        assert (await evicted).status_code == 503
        assert (await newcomer).status_code == 200
        assert (await first).status_code == 200


async def test_usage(start_sglang, chat):
    """`continuous_usage_stats` stands alone; `include_usage` adds the chunk without choices."""
    server = await start_sglang(num_tokens=2)
    answer = await chat(server, stream=True, stream_options={"continuous_usage_stats": True})
    chunks = [json.loads(one) for one in events_of(answer)[:-1]]
    assert [one["usage"]["completion_tokens"] for one in chunks] == [0, 1, 2, 2]
    answer = await chat(server, stream=True, stream_options={"include_usage": True})
    chunks = [json.loads(one) for one in events_of(answer)[:-1]]
    assert [one["usage"] is None for one in chunks] == [True] * 4 + [False]
    assert chunks[-1]["choices"] == []
    assert (await chat(server, stream_options={"include_usage": True})).status_code == 400


async def test_named_event(start_sglang, chat):
    """Where the engine sends token ids, their event has a name."""
    answer = await chat(await start_sglang(sends_sglext_ids=True), stream=True)
    assert "\n\nevent: sglext_ids\ndata: {" in answer.text


async def test_health(start_sglang, client):
    """Health takes its time, readiness looks at flags, `/ping` does not see a pause."""
    server = await start_sglang(health_s=0.2)
    before = asyncio.get_running_loop().time()
    assert (await client.get(f"{server.url}/health")).status_code == 200
    assert asyncio.get_running_loop().time() - before >= 0.2
    await client.post(f"{server.url}/pause_generation", json={})
    statuses = [
        (await client.get(f"{server.url}/{path}")).status_code for path in ("ready", "ping")
    ]
    assert statuses == [503, 200]
    await client.post(f"{server.url}/continue_generation", json={})
    assert (await client.get(f"{server.url}/ready")).status_code == 200
    server.set(is_draining=True)
    statuses = [
        (await client.get(f"{server.url}/{path}")).status_code for path in ("ready", "ping")
    ]
    assert statuses == [503, 503]


async def test_metrics_are_behind_a_flag(start_sglang, chat, client):
    """Without `--enable-metrics` there are none; loads are there all the same."""
    bare = await start_sglang()
    assert (await client.get(f"{bare.url}/metrics")).status_code == 404
    loads = (await client.get(f"{bare.url}/v1/loads?include=core,lora")).json()["loads"]
    assert loads[0]["num_running_reqs"] == 0
    assert loads[0]["lora"] == {"slots_used": 2, "slots_total": 8, "utilization": 0.25}
    server = await start_sglang(enable_metrics=True)
    await chat(server, model="m:support")
    text = (await client.get(f"{server.url}/metrics")).text
    assert 'sglang:num_requests_total{engine_type="unified",model_name="m"} 1.0' in text
    assert "support" not in text


async def test_server_info_declares_kv_events(start_sglang, client):
    """`/server_info` says where KV events are published, with a wildcard for the host."""
    server = await start_sglang(kv_events_port=5557)
    told = (await client.get(f"{server.url}/server_info")).json()
    assert told["kv_events"]["endpoint_host"] == "*"
    assert told["kv_events"]["endpoint_port_base"] == 5557


async def test_keys(start_sglang, chat, client):
    """A wrong key is a 401 with a string; health needs none; admin routes take only their own."""
    server = await start_sglang(api_key="k", admin_api_key="a")
    refused = await chat(server)
    assert refused.status_code == 401
    assert refused.json() == {"error": "Unauthorized"}
    key, admin = {"Authorization": "Bearer k"}, {"Authorization": "Bearer a"}
    assert (await chat(server, headers=key)).status_code == 200
    assert (await client.get(f"{server.url}/ready")).status_code == 200
    url, body = f"{server.url}/load_lora_adapter", {"lora_name": "n", "lora_path": "/n"}
    assert (await client.post(url, json=body, headers=key)).status_code == 401
    assert (await client.post(url, json=body, headers=admin)).status_code == 200


async def test_responses_errors_are_nested(start_sglang, client):
    """The Responses API checks the model, and nests its errors."""
    server = await start_sglang()
    url = f"{server.url}/v1/responses"
    unknown = await client.post(url, json={"model": "other", "input": "hi"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "model"
    made = (await client.post(url, json={"model": "m:support", "input": "hi"})).json()
    assert made["output"][0]["content"][0]["text"].startswith("support from")
    assert (await client.get(f"{url}/{made['id']}")).json() == made
    assert (await client.get(f"{url}/resp_none")).status_code == 404


async def test_failure_in_mid_stream_is_an_error_event(start_sglang, chat):
    """A stream that fails says so, nested, and ends with `[DONE]`."""
    answer = await chat(await start_sglang(fail_after_tokens=2), stream=True)
    *_, error, done = events_of(answer)
    assert json.loads(error)["error"]["code"] == 500
    assert done == "[DONE]"


async def test_client_that_leaves_is_noticed_late(start_sglang, chat):
    """The slot is free only some time after the client has gone."""
    server = await start_sglang(token_interval_s=60.0, disconnect_s=0.3)
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(timeout=0.1) as hasty:
            await hasty.post(f"{server.url}/v1/completions", json={"prompt": "hi"})
    assert (server.counts.running, server.counts.aborts) == (1, 0)
    await eventually(lambda: server.counts.running == 0)
    assert server.counts.aborts == 1


@pytest.mark.parametrize(
    ("switches", "error"),
    [
        ({"reset": "on_connect"}, httpx.TransportError),
        ({"reset": "before_head"}, httpx.ReadError),
        ({"reset": "after_head"}, httpx.ReadError),
        ({"die_after_tokens": 2}, httpx.ReadError),
        ({"hang": "before_head"}, httpx.ReadTimeout),
        ({"hang": "after_head"}, httpx.ReadTimeout),
    ],
)
async def test_faults(start_sglang, switches, error):
    """Faults that are switched on while it runs happen to the next request."""
    server = await start_sglang()
    server.set(**switches)
    async with httpx.AsyncClient(timeout=0.5) as client:
        body = {"prompt": "hi", "stream": True}
        with pytest.raises(error):
            await client.post(f"{server.url}/v1/completions", json=body)


async def test_errors_by_number(start_sglang, chat):
    """An error status can be had for a number of requests."""
    server = await start_sglang(error_status=500, num_errors=2)
    assert [(await chat(server)).status_code for _ in range(3)] == [500, 500, 200]


async def test_control_route(start_sglang, chat, client):
    """A server that runs as a process is switched, and asked for its accounts, over HTTP."""
    server = await start_sglang()
    told = await client.post(f"{server.url}/_control", json={"error_status": 503})
    assert (told.json()["running"], told.json()["requests"]) == (0, 0)
    assert (await chat(server)).status_code == 503
    assert (await client.post(f"{server.url}/_control", json={"nothing": 1})).status_code == 400


async def test_native_route(start_sglang, client):
    """`/generate` has errors of a third shape."""
    server = await start_sglang()
    url = f"{server.url}/generate"
    answer = await client.post(url, json={"text": "hi", "sampling_params": {"max_new_tokens": 2}})
    assert answer.json()["meta_info"]["finish_reason"] == {"type": "length"}
    refused = await client.post(url, json={"text": "hi", "lora_path": "nobody"})
    assert list(refused.json()["error"]) == ["message"]


async def test_background_response(start_sglang, client):
    """A response in the background is retrieved when it is done, or cancelled before."""
    server = await start_sglang(token_interval_s=0.01)
    url = f"{server.url}/v1/responses"
    body = {"model": "m", "input": "hi", "background": True}
    made = (await client.post(url, json=body)).json()
    assert made["status"] == "queued"
    await eventually(lambda: server.counts.running == 0)
    done = (await client.get(f"{url}/{made['id']}")).json()
    assert done["status"] == "completed"
    assert (await client.post(f"{url}/{made['id']}/cancel")).status_code == 400
    server.set(token_interval_s=0.02, num_tokens=1000)
    made = (await client.post(url, json=body)).json()
    cancelled = await client.post(f"{url}/{made['id']}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    await eventually(lambda: server.counts.running == 0)
    assert (await client.get(f"{url}/{made['id']}")).json()["status"] == "cancelled"


async def test_anthropic_messages(start_sglang):
    """`/v1/messages` is Anthropic's API, as its client reads it, with the same naming habits."""
    server = await start_sglang()
    async with anthropic.AsyncAnthropic(
        base_url=server.url, api_key="any", max_retries=0
    ) as anthropic_client:
        asked = {"max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}
        message = await anthropic_client.messages.create(model="m:support", **asked)
        assert message.content[0].text.startswith("support from /adapters/support")
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)
        async with anthropic_client.messages.stream(model="m:support", **asked) as stream:
            streamed = await stream.get_final_message()
        assert streamed.content[0].text == message.content[0].text
        with pytest.raises(anthropic.BadRequestError):
            await anthropic_client.messages.create(model="m:nobody", **asked)
        counted = await anthropic_client.messages.count_tokens(
            model="m", messages=asked["messages"]
        )
        assert counted.input_tokens == 2


def golden(model, **fields):
    """A text completion of two prompts with logprobs."""
    return {"model": model, "prompt": ["hello", "you"], "max_tokens": 1, "logprobs": 3, **fields}


async def test_prompts_are_choices_that_follow_the_files(start_sglang, client, tmp_path):
    """Each prompt is a choice; its logprobs depend on the adapter's files, not on name or path."""
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter").write_text(text)
    server = await start_sglang(lora_paths={name: str(tmp_path / name) for name in "abc"})
    tops = {}
    for name in ("m", "m:a", "m:b", "m:c"):
        choices = (await client.post(f"{server.url}/v1/completions", json=golden(name))).json()
        tops[name] = [choice["logprobs"]["top_logprobs"] for choice in choices["choices"]]
        assert [choice["index"] for choice in choices["choices"]] == [0, 1]
    assert tops["m:a"] == tops["m:b"]
    assert tops["m:a"] != tops["m:c"]
    assert tops["m"] != tops["m:a"]
    assert all(len(top[0]) == 3 for top in tops["m"])


async def test_adapter_is_read_when_it_is_loaded(start_sglang, client, tmp_path):
    """Files that change later are not seen, until a silent reload reads them."""
    (tmp_path / "adapter").write_text("one")
    server = await start_sglang(lora_paths={"a": str(tmp_path)})
    url = f"{server.url}/v1/completions"
    before = (await client.post(url, json=golden("m:a"))).json()["choices"]
    (tmp_path / "adapter").write_text("two")
    assert (await client.post(url, json=golden("m:a"))).json()["choices"] == before
    await client.post(f"{server.url}/unload_lora_adapter", json={"lora_name": "a"})
    assert (await client.post(url, json=golden("m:a"))).json()["choices"] != before


async def test_one_adapter_too_many_pushes_out_another(start_sglang, client):
    """Nobody is told that the oldest has gone."""
    server = await start_sglang(max_loaded_loras=2)
    body = {"lora_name": "third", "lora_path": "/adapters/third"}
    told = (await client.post(f"{server.url}/load_lora_adapter", json=body)).json()
    assert told["success"]
    assert set(told["loaded_adapters"]) == {"legal", "third"}
    assert server.loras.num_evicted == 1


async def test_loads_can_be_made_to_fail(start_sglang, client, tmp_path):
    """By a switch, or because there is no such folder."""
    server = await start_sglang(lora_paths={}, checks_lora_paths=True, lora_load_error="no")
    url = f"{server.url}/load_lora_adapter"
    body = {"lora_name": "a", "lora_path": str(tmp_path / "missing")}
    assert (await client.post(url, json=body)).json()["error_message"] == "no"
    server.set(lora_load_error=None)
    answer = await client.post(url, json=body)
    assert (answer.status_code, server.loras.paths()) == (400, {})


async def test_restart_forgets_adapters(start_sglang, client):
    """A new process knows none, and reloads none."""
    server = await start_sglang()
    server.loras.restart()
    answer = await client.post(f"{server.url}/v1/completions", json=golden("m:support"))
    assert answer.status_code == 400
