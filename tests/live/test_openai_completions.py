"""OpenAI's client on `/v1/completions` and `/v1/models`, through the gateway to a real vLLM."""

import uuid

import openai
import pytest

pytestmark = pytest.mark.engine

PROMPT = "Once upon a time, there was"


def salted(greedy):
    return {**greedy, "extra_body": {"cache_salt": uuid.uuid4().hex}}


def test_completion(client, gateway, greedy):
    """A completion goes on with its prompt and has our id."""
    raw = client.completions.with_raw_response.create(
        model=gateway.model, prompt=PROMPT, max_tokens=8, **greedy
    )
    answer = raw.parse()
    assert answer.id == f"cmpl-{raw.headers['x-headrace-inference-id']}"
    assert answer.object == "text_completion"
    assert answer.model == gateway.model
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text.startswith(" ")
    assert answer.usage.completion_tokens == 8


def test_completion_stream_is_the_same_text(client, gateway, greedy):
    """Streamed pieces join to the completion that is not streamed."""
    whole = client.completions.create(model=gateway.model, prompt=PROMPT, max_tokens=12, **greedy)
    chunks = list(
        client.completions.create(
            model=gateway.model, prompt=PROMPT, max_tokens=12, stream=True, **salted(greedy)
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].id.startswith("cmpl-")
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)


def test_several_prompts(client, gateway, greedy):
    """A list of prompts gives one choice each, in their order, equal to what each gets alone."""
    prompts = ["The sky is", "One, two, three,"]
    answer = client.completions.create(model=gateway.model, prompt=prompts, max_tokens=4, **greedy)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 8
    assert answer.choices[1].text.strip().startswith("four")


def test_echo_and_logprobs(client, gateway, greedy):
    """`echo` puts the prompt in front; `logprobs` tells about each token."""
    answer = client.completions.create(
        model=gateway.model, prompt="The sky is", max_tokens=2, echo=True, logprobs=1, **greedy
    )
    choice = answer.choices[0]
    assert choice.text.startswith("The sky is")
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])


def test_prompt_that_fills_the_context(client, gateway, engine, greedy):
    """A prompt of all tokens but one is answered with one token."""
    answer = client.completions.create(
        model=gateway.model, prompt=[100] * (engine.context_tokens - 1), max_tokens=1, **greedy
    )
    assert answer.usage.prompt_tokens == engine.context_tokens - 1
    assert answer.usage.completion_tokens == 1


def test_models(client, gateway, engine):
    """The list has the engine's model and the alias; each can be looked at alone."""
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {gateway.model, gateway.alias}
    assert {model.owned_by for model in models.values()} == {"headrace"}
    for name in models:
        model = client.models.retrieve(name)
        assert model.id == name
        assert model.object == "model"
        assert model.max_model_len == engine.context_tokens


def test_unknown_model_in_the_list(client):
    """A model that is not there is a 404 with OpenAI's code."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert caught.value.code == "model_not_found"
