"""Anthropic's client on `/v1/messages`, through the gateway to a real vLLM."""

import uuid

import anthropic
import pytest

pytestmark = pytest.mark.engine

MAX_TOKENS = 16
CITIES = ["Paris", "Rome"]
WEATHER = {
    "name": "get_weather",
    "description": "Current weather of a city.",
    "strict": True,
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": CITIES}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def pinned():
    return {"extra_body": {"temperature": 0, "cache_salt": uuid.uuid4().hex}}


def input_tokens(usage):
    """The whole prompt; Anthropic counts what goes through the prefix cache apart."""
    cached = (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0)
    return usage.input_tokens + cached


def test_message(claude, gateway, question):
    """A message comes whole, with its usage and reason."""
    message = claude.messages.create(
        model=gateway.model, max_tokens=MAX_TOKENS, messages=question, **pinned()
    )
    assert message.type == "message"
    assert message.role == "assistant"
    assert message.model == gateway.model
    assert [block.type for block in message.content] == ["text"]
    assert "Paris" in message.content[0].text
    assert message.stop_reason == "end_turn"
    assert input_tokens(message.usage) == 37
    assert 0 < message.usage.output_tokens < MAX_TOKENS


def test_message_id_names_the_inference(claude, gateway, question):
    """The id that feedback will name is in the body and in the head."""
    raw = claude.messages.with_raw_response.create(
        model=gateway.model, max_tokens=1, messages=question
    )
    assert raw.headers["x-headrace-inference-id"] in raw.parse().id


def test_message_stream(claude, gateway, question):
    """Events come in Anthropic's order and join to the message that is not streamed."""
    whole = claude.messages.create(
        model=gateway.model, max_tokens=MAX_TOKENS, messages=question, **pinned()
    )
    with claude.messages.stream(
        model=gateway.model, max_tokens=MAX_TOKENS, messages=question, **pinned()
    ) as stream:
        events = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert events[:2] == ["message_start", "content_block_start"]
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(events[2:-3]) == {"content_block_delta"}
    assert final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_system_prompt_and_alias(claude, gateway, question):
    """A system prompt counts as input, and an alias works here too."""
    message = claude.messages.create(
        model=gateway.alias,
        max_tokens=4,
        system="You answer with one word and nothing else at all.",
        messages=question,
        **pinned(),
    )
    counted = claude.messages.count_tokens(
        model=gateway.alias,
        system="You answer with one word and nothing else at all.",
        messages=question,
    )
    assert input_tokens(message.usage) == counted.input_tokens
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 4


def test_count_tokens(claude, gateway, question):
    """Counting gives what a message is charged with."""
    counted = claude.messages.count_tokens(model=gateway.model, messages=question)
    assert counted.input_tokens == 37


@pytest.mark.parametrize("is_stream", [False, True])
def test_tool_use(claude, gateway, is_stream):
    """Where a tool has to be used, the message is one use with input of the tool's schema."""
    asked = {
        "model": gateway.model,
        "max_tokens": 80,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "tool_choice": {"type": "tool", "name": "get_weather"},
        **pinned(),
    }
    if is_stream:
        with claude.messages.stream(**asked) as stream:
            message = stream.get_final_message()
    else:
        message = claude.messages.create(**asked)
    (use,) = [block for block in message.content if block.type == "tool_use"]
    assert use.name == "get_weather"
    assert list(use.input) == ["city"]
    assert use.input["city"] in CITIES
    assert message.stop_reason == "tool_use"


def test_unknown_model(claude, question):
    """A 404 in Anthropic's shape."""
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="no-such", max_tokens=4, messages=question)
    body = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "not_found_error"
    assert "no-such" in body["error"]["message"]
    assert body["request_id"] == caught.value.response.headers["x-headrace-inference-id"]


def test_wrong_key(claude, gateway, question):
    """A wrong `x-api-key` is a 401 in Anthropic's shape."""
    with pytest.raises(anthropic.AuthenticationError) as caught:
        claude.with_options(api_key="wrong").messages.create(
            model=gateway.model, max_tokens=4, messages=question
        )
    assert caught.value.body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": "hello"}, "messages"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
    ],
    ids=["max_tokens", "messages", "temperature"],
)
def test_bad_parameter(claude, gateway, question, arguments, field):
    """A 400 in Anthropic's shape that names the field."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(
            **{"model": gateway.model, "max_tokens": 4, "messages": question, **arguments}
        )
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert field in caught.value.body["error"]["message"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_prompt_beyond_the_context(claude, gateway, engine, is_stream):
    """A prompt that is too long is refused before anything is streamed."""
    long = [{"role": "user", "content": "hello " * (engine.context_tokens + 8)}]
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model=gateway.model, max_tokens=4, messages=long, stream=is_stream)
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert str(engine.context_tokens) in caught.value.body["error"]["message"]
