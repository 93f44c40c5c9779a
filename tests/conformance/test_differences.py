"""Where engines differ in what they can do: an adapter by its name, and a clear no to the rest."""

from __future__ import annotations

import pytest
from openai.types.responses import Response

QUESTION = [{"role": "user", "content": "Tell me about the mill."}]


def _chat(front, **fields):
    asked = {"model": front.model, "messages": QUESTION, "max_tokens": 8, **fields}
    return front.post("/v1/chat/completions", **asked)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("kind", ["vllm-sim", "sglang"])
def test_adapter_by_name(front_of, kind, is_stream):
    """The text proves which weights answered; the client reads the name that it sent."""
    front = front_of(kind)
    with front.client() as client:
        asked = {"model": "support", "messages": QUESTION, "max_tokens": 8}
        if is_stream:
            chunks = list(client.chat.completions.create(**asked, stream=True))
            said = "".join(choice.delta.content or "" for one in chunks for choice in one.choices)
            names = {one.model for one in chunks}
        else:
            answer = client.chat.completions.create(**asked)
            said, names = answer.choices[0].message.content, {answer.model}
        base = client.chat.completions.create(**{**asked, "model": front.model})
    assert said.startswith("support")
    assert names == {"support"}
    assert not base.choices[0].message.content.startswith("support")


def test_adapters_are_listed_with_their_base(front_of):
    """By the name that clients use, whatever the engine wants to be sent."""
    with front_of("sglang").client() as client:
        cards = {card.id: card.parent for card in client.models.list()}
    assert cards["support"] == "m"


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("tensorrt-llm", {"prompt_logprobs": 1}, "prompt_logprobs"),
        ("tensorrt-llm", {"return_token_ids": True}, "return_token_ids"),
        ("tensorrt-llm", {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ("tensorrt-llm", {"lora_request": {"lora_name": "a"}}, "lora_request"),
        ("sglang", {"lora_path": "support"}, "lora_path"),
    ],
)
def test_what_an_engine_cannot_do(front_of, kind, fields, param):
    """400 that names the field; the engine is not asked."""
    front = front_of(kind)
    before = front.switch()["requests"]
    answer = _chat(front, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert front.switch()["requests"] == before


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("vllm-sim", "/v1/embeddings"),
        ("tensorrt-llm", "/v1/embeddings"),
        pytest.param("vllm", "/v1/embeddings", marks=pytest.mark.engine),
        ("vllm-sim", "/v1/responses"),
        ("tensorrt-llm", "/v1/messages"),
        ("sglang", "/v1/score"),
    ],
)
def test_endpoint_that_an_engine_does_not_offer(front_of, kind, path):
    """404 that is not about the model."""
    front = front_of(kind)
    answer = front.post(path, model=front.model, input="hello")
    assert answer.status_code == 404
    assert f"does not offer {path}" in answer.json()["error"]["message"]


def test_embeddings(front_of):
    """One that does, does."""
    with front_of("sglang").client() as client:
        told = client.embeddings.create(model="m", input=["a", "b"], encoding_format="float")
    assert [len(one.embedding) for one in told.data] == [2, 2]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "kind", ["sglang", "tensorrt-llm", pytest.param("vllm", marks=pytest.mark.engine)]
)
def test_responses(front_of, kind, is_stream):
    """The Responses API, where an engine has it: its type, the public name, usage that is counted."""
    front = front_of(kind)
    before = front.tokens()
    asked = {"model": front.model, "input": "Tell me about the mill.", "max_output_tokens": 16}
    with front.client() as client:
        if is_stream:
            *_, last = client.responses.create(**asked, stream=True)
            assert last.type in ("response.completed", "response.incomplete")
            told = last.response
        else:
            told = client.responses.create(**asked)
    assert isinstance(told, Response)
    assert told.model == front.model
    assert told.id.startswith("resp_")
    counted = front.tokens()
    assert counted[0] - before[0] == told.usage.input_tokens
    assert counted[1] - before[1] == told.usage.output_tokens


def test_schema_of_tensorrt_llm_is_told_in_a_sentence(front_of):
    """Its report is a Python literal; the client reads the field and what is wrong with it."""
    front = front_of("tensorrt-llm")
    answer = front.post("/v1/chat/completions", model="m", max_tokens=1)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "Invalid 'messages': Field required.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": None,
    }
