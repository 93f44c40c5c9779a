"""OpenAI's client with tools, through the gateway to a real vLLM with the hermes parser."""

import json

import openai
import pytest

pytestmark = pytest.mark.engine

CITIES = ["Paris", "Rome"]
# `strict` makes the engine hold the model to the schema.
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": CITIES}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
MAX_TOKENS = 80


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_tool_call(client, gateway, greedy, choice):
    """Where a call is asked for, the answer is one call with arguments of the tool's schema."""
    answer = client.chat.completions.create(
        model=gateway.model,
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice=choice,
        max_tokens=MAX_TOKENS,
        **greedy,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert list(arguments) == ["city"]
    assert arguments["city"] in CITIES


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_tool_call_in_a_stream(client, gateway, greedy, choice):
    """The pieces of a streamed call join to a whole one."""
    stream = client.chat.completions.create(
        model=gateway.model,
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice=choice,
        max_tokens=MAX_TOKENS,
        stream=True,
        **greedy,
    )
    pieces = [
        piece
        for chunk in stream
        for choice_ in chunk.choices
        for piece in choice_.delta.tool_calls or []
    ]
    assert {piece.index for piece in pieces} == {0}
    assert [piece.function.name for piece in pieces if piece.function.name] == ["get_weather"]
    assert len({piece.id for piece in pieces if piece.id}) == 1
    arguments = json.loads("".join(piece.function.arguments or "" for piece in pieces))
    assert list(arguments) == ["city"]
    assert arguments["city"] in CITIES


def test_tool_result_is_answered(client, gateway, greedy):
    """A conversation goes on after a tool's result."""
    call = {
        "id": "call-1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    answer = client.chat.completions.create(
        model=gateway.model,
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call-1", "content": '{"weather": "sunny"}'},
        ],
        tools=[WEATHER],
        tool_choice="none",
        max_tokens=16,
        **greedy,
    )
    assert answer.choices[0].message.tool_calls in (None, [])
    assert answer.choices[0].message.content


def test_tool_choice_auto(client, gateway, greedy):
    """With `auto` the model may call or not; the reason says which it did."""
    answer = client.chat.completions.create(
        model=gateway.model,
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice="auto",
        max_tokens=MAX_TOKENS,
        **greedy,
    )
    choice = answer.choices[0]
    assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)
    assert bool(choice.message.content) != bool(choice.message.tool_calls)


def test_unknown_tool(client, gateway):
    """A choice of a tool that is not there is the client's error, on `tool_choice`."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=gateway.model,
            messages=MESSAGES,
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "get_time"}},
        )
    assert caught.value.param == "tool_choice"
    assert caught.value.type == "invalid_request_error"
