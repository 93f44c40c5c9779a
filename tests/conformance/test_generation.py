"""Whichever engine answers, OpenAI's client sees OpenAI's answer: chat and text completions.

Raw bytes are validated strictly against the types of the `openai` package.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Tell me about the mill."}]
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION},
    COMPLETIONS: {"prompt": "The mill is"},
}
WHOLE: dict[str, Any] = {CHAT: ChatCompletion, COMPLETIONS: Completion}
PREFIX = {CHAT: "chatcmpl-", COMPLETIONS: "cmpl-"}
OBJECT = {CHAT: "chat.completion", COMPLETIONS: "text_completion"}
both = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


def _events(answer: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends with `[DONE]` and has nothing but data."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = answer.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def _check_chunk(path: str, chunk: dict[str, Any]) -> None:
    if path == CHAT:
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
        return
    # The package has no type for a chunk of a text completion: all but the last have no reason.
    choices = [{**one, "finish_reason": one["finish_reason"] or "stop"} for one in chunk["choices"]]
    Completion.model_validate_json(json.dumps({**chunk, "choices": choices}), strict=True)


def _text(choice: dict[str, Any]) -> str:
    said = choice.get("text")
    if said is None:
        said = choice.get("delta", choice.get("message"))["content"]
    return said or ""


@both
def test_whole(front, path):
    """A whole answer: its type, our id, the public name, usage that adds up and is counted."""
    before = front.tokens()
    answer = front.post(path, model=front.model, max_tokens=4, temperature=0, **ASKED[path])
    assert answer.status_code == 200, answer.text
    told = WHOLE[path].model_validate_json(answer.content, strict=True)
    inference_id = answer.headers["x-headrace-inference-id"]
    assert (told.id, told.object) == (f"{PREFIX[path]}{inference_id}", OBJECT[path])
    assert told.model == front.model
    (choice,) = told.choices
    assert (choice.index, choice.finish_reason) == (0, "length")
    usage = told.usage
    assert usage.completion_tokens == 4
    assert usage.total_tokens == usage.prompt_tokens + 4
    after = front.tokens()
    assert (after[0] - before[0], after[1] - before[1]) == (usage.prompt_tokens, 4)


@both
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_stream(front, path, options):
    """A stream: chunks of the right type, one id, the public name, usage only where it was asked for."""
    before = front.tokens()
    fields = {} if options is None else {"stream_options": options}
    answer = front.post(
        path, model=front.model, max_tokens=4, stream=True, temperature=0, **fields, **ASKED[path]
    )
    chunks = _events(answer)
    for chunk in chunks:
        _check_chunk(path, chunk)
    inference_id = answer.headers["x-headrace-inference-id"]
    assert {chunk["id"] for chunk in chunks} == {f"{PREFIX[path]}{inference_id}"}
    assert {chunk["model"] for chunk in chunks} == {front.model}
    assert len({chunk["created"] for chunk in chunks}) == 1
    told = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    after = front.tokens()
    counted = {"prompt_tokens": after[0] - before[0], "completion_tokens": after[1] - before[1]}
    assert counted["completion_tokens"] == 4
    assert counted["prompt_tokens"] > 0
    if options == {"include_usage": True}:
        (usage,) = told
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage)
        assert {name: usage[name] for name in counted} == counted
        assert usage["total_tokens"] == sum(counted.values())
        chunks.pop()
    else:
        assert told == []
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]


@both
def test_stream_says_what_the_whole_says(front, path):
    """The pieces put together are the answer."""
    asked = {"model": front.model, "max_tokens": 6, "temperature": 0, **ASKED[path]}
    whole = front.post(path, **asked).json()
    chunks = _events(front.post(path, **asked, stream=True))
    said = "".join(_text(chunk["choices"][0]) for chunk in chunks)
    assert said == _text(whole["choices"][0])
    assert said


@both
def test_alias(front, path):
    """An alias is answered, and what it stands for is named."""
    answer = front.post(path, model=front.alias, max_tokens=2, **ASKED[path])
    assert (answer.status_code, answer.json()["model"]) == (200, front.model)


@both
@pytest.mark.parametrize("is_stream", [False, True])
def test_several_choices(front, path, is_stream):
    """`n` choices, each with its index, its text and its end."""
    asked = {"model": front.model, "max_tokens": 3, "n": 2, "temperature": 0.7, **ASKED[path]}
    answer = front.post(path, **asked, stream=is_stream)
    if is_stream:
        choices = [choice for chunk in _events(answer) for choice in chunk["choices"]]
    else:
        choices = answer.json()["choices"]
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(_text(choice) for choice in own)
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == ["length"]


@both
@pytest.mark.parametrize("is_stream", [False, True])
def test_natural_end(simulated, path, is_stream):
    """An answer that ends by itself says so."""
    asked = {"model": simulated.model, "max_tokens": 100, "stop": ["nothing"], **ASKED[path]}
    answer = simulated.post(path, **asked, stream=is_stream)
    last = _events(answer)[-1] if is_stream else answer.json()
    assert last["choices"][0]["finish_reason"] == "stop"


@pytest.mark.engine
@both
def test_stop(front_of, path):
    """The answer ends before the text that it was told to stop at; only a real engine knows how."""
    front = front_of("vllm")
    asked = {"model": front.model, "max_tokens": 12, "temperature": 0, **ASKED[path]}
    said = _text(front.post(path, **asked).json()["choices"][0])
    stop = said[3:6]
    (choice,) = front.post(path, **asked, stop=[stop]).json()["choices"]
    assert (_text(choice), choice["finish_reason"]) == (said[: said.index(stop)], "stop")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_bound(front, name):
    """The old and the new one mean the same everywhere."""
    answer = front.post(CHAT, model=front.model, messages=QUESTION, **{name: 2})
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_fields_that_only_openai_knows(front):
    """What has no meaning for an engine does no harm to a request."""
    answer = front.post(
        CHAT,
        model=front.model,
        messages=QUESTION,
        max_tokens=2,
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        user="u",
    )
    assert answer.status_code == 200, answer.text


def test_client(front, client):
    """OpenAI's own client reads all of it."""
    whole = client.chat.completions.create(
        model=front.model, messages=QUESTION, max_tokens=4, temperature=0
    )
    said, usage = "", None
    for chunk in client.chat.completions.create(
        model=front.model,
        messages=QUESTION,
        max_tokens=4,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        said += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert said == whole.choices[0].message.content
    assert usage.model_dump(include={"prompt_tokens", "completion_tokens"}) == (
        whole.usage.model_dump(include={"prompt_tokens", "completion_tokens"})
    )
    text = client.completions.create(model=front.model, prompt="The mill is", max_tokens=4)
    assert text.usage.completion_tokens == 4


def test_models(front, client):
    """Base and alias are listed, and found one by one."""
    listed = {model.id for model in client.models.list()}
    assert listed >= {front.model, front.alias}
    assert client.models.retrieve(front.model).id == front.model
