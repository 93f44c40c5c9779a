"""The simulated engine speaks vLLM's protocol as a real client reads it."""

import json

import httpx
import openai
import pytest


@pytest.fixture(name="client")
def _client(engine_port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{engine_port}/v1", api_key="any") as client:
        yield client


def chat(engine_port, **fields):
    """Posts a chat request and returns the whole response."""
    body = {"model": "bench-model", "messages": [{"role": "user", "content": "hi"}], **fields}
    return httpx.post(f"http://127.0.0.1:{engine_port}/v1/chat/completions", json=body)


def test_openai_client_reads_stream(client):
    """The OpenAI client gets the role, one delta a token, the finish reason and the usage."""
    chunks = list(
        client.chat.completions.create(
            model="bench-model",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *tokens, usage = chunks
    assert [chunk.choices[0].delta.role for chunk in tokens] == ["assistant"] + [None] * 5
    assert all(chunk.choices[0].delta.content for chunk in tokens[1:])
    assert [chunk.choices[0].finish_reason for chunk in tokens] == [None] * 5 + ["length"]
    assert usage.choices == []
    assert usage.usage.completion_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


def test_openai_client_reads_whole_answers(client):
    """Chat and text completions without streaming have vLLM's usage."""
    answer = client.chat.completions.create(
        model="bench-model", messages=[{"role": "user", "content": "hi"}], max_tokens=3
    )
    assert answer.choices[0].message.content == " the stream turns"
    assert answer.usage.completion_tokens == 3
    text = client.completions.create(model="bench-model", prompt="hi", max_tokens=2)
    assert text.choices[0].text == " the stream"
    assert text.id.startswith("cmpl-")


@pytest.mark.parametrize("pacing", ["staggered", "steps"])
def test_stream_is_vllm_bytes(engine_port, pacing):
    """Head and events are those of vLLM under uvicorn, up to `[DONE]`."""
    answer = chat(engine_port, stream=True, max_tokens=3, pacing=pacing)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["transfer-encoding"] == "chunked"
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert len(events) == 4
    token = json.loads(events[1].removeprefix("data: "))
    assert list(token) == ["id", "object", "created", "model", "choices"]
    assert list(token["choices"][0]) == [
        "index",
        "delta",
        "logprobs",
        "finish_reason",
        "token_ids",
    ]


def test_request_id_becomes_answer_id(engine_port):
    """As in vLLM, `x-request-id` names the answer."""
    url = f"http://127.0.0.1:{engine_port}/v1/chat/completions"
    answer = httpx.post(url, json={"messages": []}, headers={"X-Request-Id": "abc"})
    assert answer.json()["id"] == "chatcmpl-abc"


def test_errors_have_vllm_shape(engine_port):
    """An unknown model is a nested 404, a body that is no JSON a 400."""
    unknown = chat(engine_port, model="other")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "model"
    url = f"http://127.0.0.1:{engine_port}/v1/chat/completions"
    assert httpx.post(url, content=b"{").status_code == 400
    assert httpx.get(f"http://127.0.0.1:{engine_port}/nothing").status_code == 404


def test_lists_models_and_routes(engine_port):
    """A gateway can learn the model and the endpoints."""
    base = f"http://127.0.0.1:{engine_port}"
    assert httpx.get(f"{base}/v1/models").json()["data"][0]["id"] == "bench-model"
    assert "/v1/chat/completions" in httpx.get(f"{base}/openapi.json").json()["paths"]
    assert "vllm:num_requests_running" in httpx.get(f"{base}/metrics").text
