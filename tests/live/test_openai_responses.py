"""OpenAI's client on `/v1/responses`, through the gateway to a real vLLM."""

import uuid

import openai
import pytest

pytestmark = pytest.mark.engine

QUESTION = "What is the capital of France?"
MAX_TOKENS = 20


def pinned():
    return {"temperature": 0, "extra_body": {"cache_salt": uuid.uuid4().hex}}


def test_response(client, gateway):
    """A response has our id, its text and its usage."""
    raw = client.responses.with_raw_response.create(
        model=gateway.model, input=QUESTION, max_output_tokens=MAX_TOKENS, **pinned()
    )
    response = raw.parse()
    assert response.id == f"resp_{raw.headers['x-headrace-inference-id']}000"
    assert response.status == "completed"
    assert response.model == gateway.model
    assert "Paris" in response.output_text
    assert response.usage.input_tokens == 37
    assert response.usage.output_tokens > 0


def test_response_stream(client, gateway):
    """Events come in order, join to the same text, and name the inference."""
    whole = client.responses.create(
        model=gateway.model, input=QUESTION, max_output_tokens=MAX_TOKENS, **pinned()
    )
    with client.responses.with_streaming_response.create(
        model=gateway.model,
        input=QUESTION,
        max_output_tokens=MAX_TOKENS,
        stream=True,
        **pinned(),
    ) as raw:
        inference_id = raw.headers["x-headrace-inference-id"]
        events = list(raw.parse())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert {event.response.id for event in events if hasattr(event, "response")} == {
        f"resp_{inference_id}000"
    }
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 2
    assert "".join(deltas) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_response_by_alias(client, gateway):
    """The alias is rewritten in this body too."""
    response = client.responses.create(
        model=gateway.alias, input=QUESTION, max_output_tokens=4, **pinned()
    )
    assert response.model == gateway.model


def test_response_of_an_unknown_model(client):
    """The errors are the same as elsewhere."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="no-such-model", input=QUESTION)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("is_stream", [False, True])
def test_response_beyond_the_context(client, gateway, engine, is_stream):
    """A prompt that is too long is refused before anything is streamed."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(
            model=gateway.model, input="hello " * (engine.context_tokens + 8), stream=is_stream
        )
    assert caught.value.code == "context_length_exceeded"
