"""The pitfalls of routing to these engines, one test a row, through a gateway and real sockets.

Each is a habit of an engine that would hurt its users if the gateway did not know of it. Not here,
because the gateway neither loads nor unloads adapters by itself yet and reads no KV events:

- vLLM: `load_inplace`, adapter directories that vanish, more adapters registered than
  `max_cpu_loras`, one adapter registry per process;
- SGLang: an unload that waits, an unload that does not revoke, `dp_size` and dynamic adapters,
  signed hashes;
- TensorRT-LLM: one integer id for each version of an adapter, one reader of `/kv_cache_events`;
- all: a gap in the sequence of KV events.

`--shutdown-timeout` is among the launch flags (`tests/serving/engines/test_launch.py`).
"""

from __future__ import annotations

import json

import pytest
from base_server import DONE
from eventually import eventually
from raw_client import get, post
from scripted_engine import Act, chat_events, error_body, event, json_reply, stream_reply

from serving.config import Resilience
from serving.fleet import registry as registry_module

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**CHAT, "stream": True}


def _events(answer):
    """The JSON of a stream's events, `[DONE]` left out."""
    parts = [part for part in answer.body.split(b"\n\n") if part and part != DONE.strip()]
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


def _text(answer):
    return answer.json["choices"][0]["message"]["content"]


@pytest.fixture
def quick_probes(monkeypatch):
    """Probes every 20 ms."""
    monkeypatch.setattr(registry_module, "PROBE_INTERVAL_S", 0.02)


# vLLM.


async def test_vllm_abort_under_a_200_is_retried(start_vllm, start_gateway):
    """200 with `finish_reason: abort` before any text is a failure, streamed or not."""
    engines = [await start_vllm(), await start_vllm()]
    gateway = await start_gateway(*engines)
    aborted = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]})
    role = chat_events("x", "m", 0, usage=None)[0]
    whole = {"choices": [{"message": {"content": ""}, "finish_reason": "abort"}]}
    encoded = json.dumps(whole, separators=(",", ":")).encode()
    for body, script in (
        (STREAM, stream_reply([role, aborted, DONE])),
        (CHAT, json_reply(encoded)),
    ):
        before = gateway.metric("headrace_retries_total")
        engines[0].scripts.append(script)
        while engines[0].scripts:
            answer = await gateway.post(body)
            assert answer.status == 200
            assert b"abort" not in answer.body
        assert gateway.metric("headrace_retries_total") == before + 1


@pytest.mark.usefixtures("quick_probes")
@pytest.mark.parametrize(
    "script",
    [
        [Act.HANG],
        json_reply(error_body("cannot schedule new futures after shutdown", "X", 500), status=500),
    ],
    ids=["paused", "draining"],
)
async def test_vllm_health_cannot_show_paused_or_draining(start_vllm, start_gateway, script):
    """Its health says 200 all the while: a token that has to be generated tells."""
    vllm = await start_vllm()
    quick = Resilience(canary_interval_s=0.05, canary_timeout_s=0.1)
    gateway = await start_gateway(vllm, resilience=quick)
    vllm.always = script
    await eventually(lambda: not gateway.worker.snapshot.is_ready)
    assert vllm.is_healthy
    assert (await gateway.post(CHAT)).code == "no_replica_available"
    vllm.always = None
    await eventually(lambda: gateway.worker.snapshot.is_ready)


@pytest.mark.parametrize(
    "path",
    [
        "/invocations", "/sleep?level=1", "/pause", "/resume", "/collective_rpc", "/update_weights",
        "/reset_prefix_cache", "/v1/load_lora_adapter", "/adapters", "/server_info", "/scale_elastic_ep",
    ],
)  # fmt: skip
async def test_vllm_open_and_dev_routes_are_not_reachable(start_vllm, start_gateway, path):
    """vLLM asks for no key there: through us they do not exist."""
    vllm = await start_vllm()
    gateway = await start_gateway(vllm)
    for request in (post({"model": "m"}, path), get(path)):
        assert (await gateway.ask(request)).code == "unknown_url"
    assert vllm.requests == []


# SGLang.


@pytest.mark.parametrize("is_stream", [False, True])
async def test_sglang_adapter_is_sent_as_base_and_name(start_sglang, start_gateway, is_stream):
    """A bare adapter name would be answered by the base, silently."""
    sglang = await start_sglang(num_tokens=3)
    gateway = await start_gateway(sglang)
    answer = await gateway.post({**CHAT, "model": "support", "stream": is_stream})
    assert sglang.requests[0].json["model"] == "m:support"
    if is_stream:
        chunks = _events(answer)
        said = "".join(one["choices"][0]["delta"]["content"] or "" for one in chunks)
        assert said.startswith("support from /adapters/support")
        assert {one["model"] for one in chunks} == {"support"}
    else:
        assert _text(answer).startswith("support from /adapters/support")
        assert answer.json["model"] == "support"


@pytest.mark.parametrize("name", ["gpt-9", "m:nobody", "m:support", "x:support", ":support"])
async def test_sglang_names_are_validated_by_us(start_sglang, start_gateway, name):
    """It would answer an unknown name from the base, and any name with a colon from an adapter."""
    sglang = await start_sglang()
    gateway = await start_gateway(sglang)
    answer = await gateway.post({**CHAT, "model": name})
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert sglang.requests == []


async def test_sglang_lora_path_cannot_go_past_the_names(start_sglang, start_gateway):
    """It selects an adapter too: refused, since nobody checked it."""
    sglang = await start_sglang()
    gateway = await start_gateway(sglang)
    answer = await gateway.post({**CHAT, "lora_path": "support"})
    assert (answer.status, answer.json["error"]["param"]) == (400, "lora_path")
    assert sglang.requests == []


@pytest.mark.parametrize("is_stream", [False, True])
async def test_sglang_first_event_is_read_before_a_200(start_sglang, start_gateway, is_stream):
    """A full queue is an error event under a 200: retried, and a 503 where everybody is full."""
    full = await start_sglang(max_running_requests=0, max_queued_requests=0)
    well = await start_sglang()
    body = {**CHAT, "stream": is_stream}
    gateway = await start_gateway(full, well)
    for _ in range(6):
        assert (await gateway.post(body)).status == 200
    assert full.requests
    alone = await start_gateway(full)
    answer = await alone.post(body)
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "overloaded", "1")


async def test_sglang_rids_are_of_one_length(start_sglang, start_gateway):
    """Its abort ends whatever begins with an id: none of ours begins with another."""
    sglang = await start_sglang()
    gateway = await start_gateway(sglang)
    for _ in range(20):
        answer = await gateway.post({**CHAT, "rid": "a"})
        assert answer.json["id"] == f"chatcmpl-{answer.headers['x-headrace-inference-id']}"
    rids = [seen.json["rid"] for seen in sglang.requests]
    assert len(set(rids)) == 20
    assert len({len(rid) for rid in rids}) == 1


@pytest.mark.usefixtures("quick_probes")
@pytest.mark.parametrize("how", ["paused", "draining", "unhealthy"])
async def test_sglang_is_probed_at_ready(start_sglang, start_gateway, how):
    """Its `/health` generates for a second and more; `/ready` looks at flags."""
    sglang = await start_sglang(health_s=30.0)
    gateway = await start_gateway(sglang)
    assert {seen.target for seen in sglang.probes} == {"/ready", "/v1/models", "/openapi.json"}
    if how == "paused":
        sglang.batch.is_paused = True
    else:
        sglang.set(**({"is_draining": True} if how == "draining" else {"is_healthy": False}))
    await eventually(lambda: not gateway.worker.snapshot.is_ready)
    sglang.batch.is_paused = False
    sglang.set(is_draining=False, is_healthy=True)
    await eventually(lambda: gateway.worker.snapshot.is_ready)


async def test_sglang_own_events_are_withheld(start_sglang, start_gateway):
    """`event: sglext_ids` comes between events that pass as whole blocks: it is found all the same."""
    sglang = await start_sglang(sends_sglext_ids=True, num_tokens=20)
    gateway = await start_gateway(sglang)
    for body in (STREAM, {**STREAM, "model": "support"}):
        answer = await gateway.post(body)
        assert b"sglext" not in answer.body
        assert answer.body.count(b'"delta"') == 22
        assert answer.body.endswith(DONE)


# TensorRT-LLM.


async def test_tensorrt_llm_unknown_fields_are_stripped(start_tensorrt_llm, start_gateway):
    """It refuses whatever it does not know; clients and other engines know more."""
    trt = await start_tensorrt_llm()
    gateway = await start_gateway(trt)
    extras = {
        "store": True,
        "metadata": {},
        "priority": 1,
        "rid": "x",
        "session_id": "y",
        "top_k": 5,
    }
    assert (await gateway.post({**CHAT, **extras, "max_completion_tokens": 2})).status == 200
    sent = trt.requests[-1].json
    assert (sent["top_k"], sent["max_tokens"]) == (5, 2)
    assert sent.keys().isdisjoint(extras.keys() - {"top_k"})


async def test_tensorrt_llm_400_may_be_its_own_failure(start_tensorrt_llm, start_gateway):
    """Every exception is a 400 there: one of the engine's is retried, one of the client's is not."""
    engines = [await start_tensorrt_llm(), await start_tensorrt_llm()]
    gateway = await start_gateway(*engines)
    engines[0].set(fail_after_tokens=0)
    engines[0].error_reply = lambda status, message: json_reply_of(
        status, "CppExecutorError: out of memory"
    )
    for _ in range(4):
        assert (await gateway.post(CHAT)).status == 200
    assert gateway.metric("headrace_retries_total") >= 1
    engines[0].set(fail_after_tokens=None)
    del engines[0].error_reply
    before = sum(len(engine.requests) for engine in engines)
    answer = await gateway.post({**CHAT, "messages": [{"role": "user", "content": "a " * 5000}]})
    assert (answer.status, answer.code) == (400, "context_length_exceeded")
    assert sum(len(engine.requests) for engine in engines) == before + 1


def json_reply_of(status, message):
    """A flat error, as a reply."""
    told = {"object": "error", "message": message, "type": "BadRequestError", "code": status}
    yield from json_reply(told, status=status)


@pytest.mark.parametrize("fault", ["fail_after_tokens", "die_after_tokens"])
async def test_tensorrt_llm_missing_done_is_a_failure(start_tensorrt_llm, start_gateway, fault):
    """Its broken streams just end: the client gets one error event, the replica a bad mark."""
    trt = await start_tensorrt_llm(**{fault: 2})
    gateway = await start_gateway(trt)
    answer = await gateway.post(STREAM)
    *chunks, last = _events(answer)
    assert "".join(one["choices"][0]["delta"]["content"] for one in chunks).startswith("m")
    assert last["error"]["code"] == "upstream_error"
    assert DONE not in answer.body
    assert gateway.metric("headrace_requests_total", code="502") == 1


async def test_tensorrt_llm_chunk_ids_are_normalised(start_tensorrt_llm, start_gateway):
    """Each chunk has an id of its own there, and none of ours."""
    trt = await start_tensorrt_llm()
    gateway = await start_gateway(trt)
    answer = await gateway.post(STREAM)
    ids = {one["id"] for one in _events(answer)}
    assert ids == {f"chatcmpl-{answer.headers['x-headrace-inference-id']}"}


async def test_tensorrt_llm_names_are_validated_by_us(start_tensorrt_llm, start_gateway):
    """It answers every name from its base."""
    trt = await start_tensorrt_llm()
    gateway = await start_gateway(trt)
    assert (await gateway.post({**CHAT, "model": "support"})).code == "model_not_found"
    assert trt.requests == []


async def test_tensorrt_llm_paths_are_nothing_for_clients(start_tensorrt_llm, start_gateway):
    """`lora_request` names a path on the engine's machine: never a client's."""
    trt = await start_tensorrt_llm()
    gateway = await start_gateway(trt)
    lora = {"lora_name": "a", "lora_int_id": 1, "lora_path": "/etc"}
    answer = await gateway.post({**CHAT, "lora_request": lora})
    assert (answer.status, answer.json["error"]["param"]) == (400, "lora_request")
    assert trt.requests == []


@pytest.mark.usefixtures("quick_probes")
async def test_tensorrt_llm_metrics_are_left_to_one_reader(start_tensorrt_llm, start_gateway):
    """Reading `/metrics` or `/kv_cache_events` there takes away what was read: probes do not."""
    trt = await start_tensorrt_llm()
    await start_gateway(trt)
    await eventually(lambda: len(trt.probes) > 9)
    assert {seen.target for seen in (*trt.probes, *trt.requests)} <= {
        "/health",
        "/v1/models",
        "/openapi.json",
        "/prometheus/metrics",
    }


# All of them.


async def test_all_errors_are_wrapped_again(
    start_vllm, start_sglang, start_tensorrt_llm, start_gateway
):
    """Nested, flat or a bare string: the client gets one shape, and nothing of the engine's words."""
    for start in (start_vllm, start_sglang, start_tensorrt_llm):
        engine = await start()
        if start is start_vllm:
            engine.always = json_reply(error_body("boom", "InternalServerError", 500), status=500)
        else:
            engine.set(error_status=500)
        gateway = await start_gateway(engine)
        for body in (CHAT, STREAM):
            answer = await gateway.post(body)
            assert answer.status == 502
            assert answer.json == {
                "error": {
                    "message": "The engine failed while it worked on this request.",
                    "type": "server_error",
                    "param": None,
                    "code": "upstream_error",
                }
            }


@pytest.mark.parametrize(
    ("engine", "field", "sent"),
    [("sglang", "priority", -3), ("vllm", "priority", 3), ("tensorrt-llm", "priority", None)],
)
async def test_all_priorities_point_the_same_way(
    start_vllm, start_sglang, start_tensorrt_llm, start_gateway, engine, field, sent
):
    """Lower is earlier for clients, whichever way the engine counts; one counts not at all."""
    start = {"vllm": start_vllm, "sglang": start_sglang, "tensorrt-llm": start_tensorrt_llm}[engine]
    server = await start()
    gateway = await start_gateway(server)
    assert (await gateway.post({**CHAT, field: 3})).status == 200
    assert server.requests[-1].json.get(field) == sent


async def test_all_get_our_request_id(start_vllm, start_sglang, start_gateway):
    """By each engine's own way, so that its log and ours can be laid side by side."""
    vllm, sglang = await start_vllm(), await start_sglang()
    for engine in (vllm, sglang):
        gateway = await start_gateway(engine)
        inference_id = (await gateway.post(CHAT)).headers["x-headrace-inference-id"]
        assert engine.requests[-1].headers["x-request-id"] == inference_id
    assert sglang.requests[-1].json["rid"] == f"chatcmpl-{inference_id}"
