"""OpenAI's client meets errors: its own classes, with OpenAI's type, code and param."""

import openai
import pytest

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("is_stream", [False, True])
def test_prompt_beyond_the_context(client, gateway, engine, is_stream):
    """A prompt that is too long is a 400 with OpenAI's code, also where a stream was asked for."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=gateway.model,
            messages=[{"role": "user", "content": "hello " * (engine.context_tokens + 8)}],
            max_tokens=4,
            stream=is_stream,
        )
    assert caught.value.status_code == 400
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.type == "invalid_request_error"
    assert str(engine.context_tokens) in caught.value.message


def test_completion_prompt_beyond_the_context(client, gateway, engine):
    """One token too many is too many, on completions as well."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            model=gateway.model, prompt=[100] * (engine.context_tokens + 1), max_tokens=1
        )
    assert caught.value.code == "context_length_exceeded"


def test_answer_beyond_the_context(client, gateway, engine, question):
    """So is an answer that is asked to be longer than the context."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=gateway.model, messages=question, max_tokens=engine.context_tokens + 1
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"


def test_embeddings_are_not_offered(client, gateway):
    """What the engine does not offer is a 404 that says so, not one about the model."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model=gateway.model, input="hello")
    assert caught.value.code == "endpoint_not_offered"
    assert caught.value.body["message"] == (
        f"The engine that serves '{gateway.model}' does not offer /v1/embeddings."
    )


@pytest.mark.parametrize("is_stream", [False, True])
def test_unknown_model(client, question, is_stream):
    """A model that nobody serves is a 404 on `model`."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such", messages=question, stream=is_stream)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert caught.value.type == "invalid_request_error"
    assert "no-such" in caught.value.message


def test_wrong_key(client, gateway, question):
    """A wrong key is OpenAI's authentication error."""
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key=f"{gateway.api_key}x").chat.completions.create(
            model=gateway.model, messages=question
        )
    assert caught.value.status_code == 401
    assert caught.value.code == "invalid_api_key"
    assert gateway.api_key not in caught.value.message


def test_wrong_key_learns_nothing_of_the_models(client):
    """The list of models needs a key too."""
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": "hello"}, "messages"),
        ({"logprobs": True, "top_logprobs": 50}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"model": 7}, "model"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_parameter(client, gateway, question, arguments, param):
    """A parameter that cannot be used is a 400 that names it and hides the engine's inside."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            **{"model": gateway.model, "messages": question, **arguments}
        )
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert param.replace("_", " ") in caught.value.message.lower().replace("_", " ")
    for jargon in ("vllm", "pydantic", "Traceback", "body."):
        assert jargon not in caught.value.message


def test_missing_model(client, question):
    """A request without a model is told which field it misses."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"messages": question}, cast_to=object)
    assert caught.value.param == "model"


def test_unknown_path(client):
    """An engine's own routes are not there."""
    for path in ("/load_lora_adapter", "/systemone", "/../sleep"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.post(path, body={}, cast_to=object)
        assert caught.value.code == "unknown_url"


def test_error_carries_the_request_id(client, question):
    """An error names its request as an answer does."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(
            model="no-such", messages=question, extra_headers={"x-request-id": "mine-43"}
        )
    assert caught.value.request_id == "mine-43"
