"""OpenAI's client on `/v1/chat/completions`, through the gateway to a real vLLM."""

import asyncio
import math
import uuid

import pytest
from pydantic import BaseModel, ConfigDict, Field

pytestmark = pytest.mark.engine

MAX_TOKENS = 24


class City(BaseModel):
    """What a structured answer has to look like."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    population: int = Field(ge=0, le=50_000_000)


def salted(greedy):
    return {**greedy, "extra_body": {"cache_salt": uuid.uuid4().hex}}


def read_stream(stream):
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    return chunks, text, reasons


def test_chat_answers(client, gateway, greedy, question):
    """A greedy answer comes whole, with its usage, its model and the id that feedback will name."""
    raw = client.chat.completions.with_raw_response.create(
        model=gateway.model, messages=question, max_tokens=MAX_TOKENS, **greedy
    )
    answer = raw.parse()
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == gateway.model
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == 37
    assert 0 < answer.usage.completion_tokens < MAX_TOKENS
    assert answer.usage.total_tokens == 37 + answer.usage.completion_tokens
    assert answer.id == f"chatcmpl-{raw.headers['x-headrace-inference-id']}"
    assert raw.headers["x-request-id"] == raw.headers["x-headrace-inference-id"]


def test_stream_is_the_same_answer(client, gateway, greedy, question):
    """Streamed pieces join to the answer that is not streamed; every chunk names the inference."""
    whole = client.chat.completions.create(
        model=gateway.model, messages=question, max_tokens=MAX_TOKENS, **greedy
    )
    with client.chat.completions.with_streaming_response.create(
        model=gateway.model,
        messages=question,
        max_tokens=MAX_TOKENS,
        stream=True,
        **salted(greedy),
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        inference_id = response.headers["x-headrace-inference-id"]
        chunks, text, reasons = read_stream(response.parse())
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason]
    assert len(chunks) > 2
    assert {chunk.id for chunk in chunks} == {f"chatcmpl-{inference_id}"}
    assert {chunk.model for chunk in chunks} == {gateway.model}
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert all(chunk.choices for chunk in chunks)


@pytest.mark.parametrize("options", [{}, {"include_usage": False}])
def test_stream_hides_the_usage_that_was_not_asked_for(client, gateway, greedy, question, options):
    """The gateway asks for each stream's usage; a client that did not never sees that chunk."""
    chunks, _, _ = read_stream(
        client.chat.completions.create(
            model=gateway.model,
            messages=question,
            max_tokens=4,
            stream=True,
            stream_options=options,
            **greedy,
        )
    )
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert all(chunk.choices for chunk in chunks)


def test_stream_shows_the_usage_that_was_asked_for(client, gateway, greedy, question):
    """With `include_usage` the last chunk has no choice and the same counts as the whole answer."""
    whole = client.chat.completions.create(
        model=gateway.model, messages=question, max_tokens=MAX_TOKENS, **greedy
    )
    chunks, _, _ = read_stream(
        client.chat.completions.create(
            model=gateway.model,
            messages=question,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            **salted(greedy),
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_async_clients_at_once(async_client, gateway, question):
    """Eight clients at once, streaming and not, all get their own whole answer."""

    async def ask(number):
        max_tokens = 5 + number
        options = {
            "model": gateway.model,
            "messages": question,
            "max_tokens": max_tokens,
            "extra_body": {"ignore_eos": True},
        }
        if number % 2:
            answer = await async_client.chat.completions.create(**options)
            return answer.id, answer.usage.completion_tokens == max_tokens
        stream = await async_client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **options
        )
        chunks = [chunk async for chunk in stream]
        assert len({chunk.id for chunk in chunks}) == 1
        return chunks[-1].id, chunks[-1].usage.completion_tokens == max_tokens

    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(number)) for number in range(8)]
    results = [task.result() for task in asked]
    assert len({answer_id for answer_id, _ in results}) == 8
    assert all(is_whole for _, is_whole in results)


def test_alias_answers_as_its_model(client, gateway, greedy, question):
    """An alias is served by its model, whose name the answer carries."""
    by_name = client.chat.completions.create(
        model=gateway.model, messages=question, max_tokens=MAX_TOKENS, **greedy
    )
    by_alias = client.chat.completions.create(
        model=gateway.alias, messages=question, max_tokens=MAX_TOKENS, **salted(greedy)
    )
    assert by_alias.choices[0].message.content == by_name.choices[0].message.content
    assert by_alias.model == gateway.model


def test_seed_reproduces_a_sampled_answer(client, gateway, question):
    """Sampling with a seed is repeatable, and another seed gives another answer."""

    def sample(seed):
        answer = client.chat.completions.create(
            model=gateway.model,
            messages=question,
            temperature=1.5,
            seed=seed,
            max_tokens=MAX_TOKENS,
            extra_body={"cache_salt": uuid.uuid4().hex, "ignore_eos": True},
        )
        return answer.choices[0].message.content

    assert sample(11) == sample(11)
    assert sample(11) != sample(12)


def test_stop_ends_the_answer_before_the_string(client, gateway, greedy, question):
    """A stop string is where the answer ends, without it."""
    whole = client.chat.completions.create(
        model=gateway.model, messages=question, max_tokens=MAX_TOKENS, **greedy
    )
    text = whole.choices[0].message.content
    stop = text.split()[2]
    cut = client.chat.completions.create(
        model=gateway.model,
        messages=question,
        max_tokens=MAX_TOKENS,
        stop=[stop],
        **salted(greedy),
    )
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_max_tokens_ends_the_answer(client, gateway, greedy, question):
    """`max_completion_tokens` bounds the answer, which says so."""
    answer = client.chat.completions.create(
        model=gateway.model, messages=question, max_completion_tokens=3, **greedy
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_logprobs(client, gateway, greedy, question):
    """Each token has its log probability and the most probable three, of which greedy is the first."""
    answer = client.chat.completions.create(
        model=gateway.model,
        messages=question,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
        **greedy,
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 5
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == token.logprob
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001


def test_logprobs_in_a_stream(client, gateway, greedy, question):
    """Streamed log probabilities belong to the streamed tokens."""
    chunks, text, _ = read_stream(
        client.chat.completions.create(
            model=gateway.model,
            messages=question,
            max_tokens=5,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            **greedy,
        )
    )
    tokens = [
        token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert "".join(token.token for token in tokens) == text
    assert [len(token.top_logprobs) for token in tokens] == [2] * 5


@pytest.mark.parametrize("is_stream", [False, True])
def test_two_choices(client, gateway, question, is_stream):
    """`n=2` gives two whole answers, told apart by their index, and the usage of both."""
    answer = client.chat.completions.create(
        model=gateway.model,
        messages=question,
        temperature=1.0,
        seed=5,
        n=2,
        max_tokens=6,
        stream=is_stream,
        extra_body={"ignore_eos": True},
        **({"stream_options": {"include_usage": True}} if is_stream else {}),
    )
    if is_stream:
        chunks, _, _ = read_stream(answer)
        usage = chunks[-1].usage
        ended = [c for chunk in chunks for c in chunk.choices if c.finish_reason]
    else:
        usage, ended = answer.usage, answer.choices
    assert sorted(choice.index for choice in ended) == [0, 1]
    assert [choice.finish_reason for choice in ended] == ["length", "length"]
    assert usage.completion_tokens == 12
    assert usage.prompt_tokens == 37


def test_structured_output(client, gateway, greedy):
    """`response_format: json_schema` gives JSON of that schema."""
    answer = client.chat.completions.create(
        model=gateway.model,
        messages=[{"role": "user", "content": "Describe a city as JSON."}],
        max_tokens=80,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": City.model_json_schema(), "strict": True},
        },
        **greedy,
    )
    assert answer.choices[0].finish_reason == "stop"
    City.model_validate_json(answer.choices[0].message.content)


def test_structured_output_parsed_by_the_client(client, gateway, greedy):
    """The client's own `parse` gets an object, streamed as well."""
    messages = [{"role": "user", "content": "Describe a city as JSON."}]
    options = {"model": gateway.model, "messages": messages, "max_tokens": 80}
    answer = client.chat.completions.parse(response_format=City, **options, **greedy)
    assert isinstance(answer.choices[0].message.parsed, City)
    with client.chat.completions.stream(
        response_format=City, **options, **salted(greedy)
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


def test_raw_response_headers(client, gateway, question):
    """The client's own request id comes back; the inference id stays ours."""
    raw = client.chat.completions.with_raw_response.create(
        model=gateway.model,
        messages=question,
        max_tokens=1,
        extra_headers={"x-request-id": "mine-42"},
    )
    assert raw.headers["x-request-id"] == "mine-42"
    assert raw.request_id == "mine-42"
    assert raw.parse().id == f"chatcmpl-{raw.headers['x-headrace-inference-id']}"
    assert "mine-42" not in raw.headers["x-headrace-inference-id"]
