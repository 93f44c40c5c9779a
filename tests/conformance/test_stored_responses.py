"""Responses that an engine keeps, by the id that its client was given: read, deleted, cancelled."""

from __future__ import annotations

import re

import openai
import pytest

KEEPING = ["sglang", "tensorrt-llm"]
"""vLLM keeps none unless its environment says so."""
ASKED = {"model": "m", "input": "Tell me about the mill.", "max_output_tokens": 16}
GONE = f"resp_{'0' * 35}"


def _create(client, *, is_stream):
    if not is_stream:
        return client.responses.create(**ASKED)
    events = list(client.responses.create(**ASKED, stream=True))
    told = [event.response for event in events if hasattr(event, "response")]
    assert len(told) > 1
    assert {response.id for response in told} == {told[-1].id}
    return told[-1]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("kind", KEEPING)
def test_response_is_read_again(front_of, kind, is_stream):
    """The id names our inference and the replica; the text is what was generated."""
    with front_of(kind).client() as client:
        made = _create(client, is_stream=is_stream)
        read = client.responses.retrieve(made.id)
    assert re.fullmatch(r"resp_[0-9a-f]{12}7[0-9a-f]{19}000", made.id)
    assert (read.id, read.output_text) == (made.id, made.output_text)
    assert made.output_text


@pytest.mark.parametrize("kind", KEEPING)
def test_id_has_the_inference_id(front_of, kind):
    """That by which feedback is given."""
    answer = front_of(kind).post("/v1/responses", **ASKED)
    inference_id = answer.headers["x-headrace-inference-id"]
    assert answer.json()["id"] == f"resp_{inference_id}000"


def test_response_is_deleted(front_of):
    """TensorRT-LLM alone has this; a second time there is nothing to delete or read."""
    with front_of("tensorrt-llm").client() as client:
        made = _create(client, is_stream=False)
        client.responses.delete(made.id)
        for ask in (client.responses.delete, client.responses.retrieve):
            with pytest.raises(openai.NotFoundError) as raised:
                ask(made.id)
            assert raised.value.code == "response_not_found"


def test_response_is_cancelled(front_of):
    """SGLang: one in the background that is not done."""
    front = front_of("sglang")
    front.switch(token_interval_s=60.0)
    try:
        with front.client() as client:
            made = client.responses.create(**ASKED, background=True)
            assert client.responses.cancel(made.id).status == "cancelled"
            assert client.responses.retrieve(made.id).status == "cancelled"
    finally:
        front.switch(token_interval_s=0.0)


@pytest.mark.parametrize("kind", [*KEEPING, pytest.param("vllm", marks=pytest.mark.engine)])
def test_response_that_is_not_kept(front_of, kind):
    """404 of the response and not of the model."""
    with front_of(kind).client() as client, pytest.raises(openai.NotFoundError) as raised:
        client.responses.retrieve(GONE)
    assert raised.value.code == "response_not_found"
    assert "model" not in raised.value.message


def test_response_goes_on_from_another(front_of):
    """By the id that the client was given; one that is not kept is a 404 of the response."""
    with front_of("tensorrt-llm").client() as client:
        made = _create(client, is_stream=False)
        assert client.responses.create(**ASKED, previous_response_id=made.id).output_text
        with pytest.raises(openai.NotFoundError) as raised:
            client.responses.create(**ASKED, previous_response_id=GONE)
    assert raised.value.code == "response_not_found"
