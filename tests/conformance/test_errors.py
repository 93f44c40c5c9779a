"""Whichever engine refuses or fails, OpenAI's client raises the same error for the same reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import openai
import pytest

QUESTION = [{"role": "user", "content": "Tell me about the mill."}]
streamed = pytest.mark.parametrize("is_stream", [False, True])
FAILING = ("sglang", "tensorrt-llm")
"""Engines that can be told to fail."""


def _create(client, front, **fields):
    asked = {"model": front.model, "messages": QUESTION, "max_tokens": 4, **fields}
    return client.chat.completions.create(**asked)


@streamed
def test_unknown_model(front, client, is_stream):
    """404, although two of the engines would answer from their base."""
    with pytest.raises(openai.NotFoundError) as caught:
        _create(client, front, model="no-such", stream=is_stream)
    error = caught.value
    assert (error.code, error.param, error.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


@pytest.mark.parametrize("name", ["support:", ":support", "m:support", "m:nobody", "nobody"])
def test_engines_own_ways_of_naming_are_unknown_models(simulated, name):
    """`base:adapter` is between us and the engine; it never sees a name that we do not know."""
    before = simulated.server.metric("headrace_requests_total", code="200")
    with simulated.client() as client, pytest.raises(openai.NotFoundError) as caught:
        _create(client, simulated, model=name)
    assert caught.value.code == "model_not_found"
    assert simulated.server.metric("headrace_requests_total", code="200") == before


def test_bad_field(front, client):
    """A value of the wrong type is a 400 that names the field."""
    with pytest.raises(openai.BadRequestError) as caught:
        _create(client, front, n="two")
    assert (caught.value.param, caught.value.type) == ("n", "invalid_request_error")


def test_engine_refusal(front, client):
    """What only the engine can find wrong is a 400 in OpenAI's shape."""
    with pytest.raises(openai.BadRequestError) as caught:
        _create(client, front, stream_options={"include_usage": True})
    assert caught.value.type == "invalid_request_error"
    assert "stream" in caught.value.body["message"].lower()


@streamed
def test_prompt_beyond_the_context(front, client, is_stream):
    """400 with OpenAI's code, also where a stream was asked for."""
    prompt = [{"role": "user", "content": "hello " * 9000}]
    with pytest.raises(openai.BadRequestError) as caught:
        _create(client, front, messages=prompt, stream=is_stream)
    assert (caught.value.code, caught.value.type) == (
        "context_length_exceeded",
        "invalid_request_error",
    )


@pytest.fixture(scope="session")
def full_front(fronts):
    """Starts engines that take one request at a time and queue none.

    TensorRT-LLM never refuses for want of room, and the real vLLM of the session has no bound.
    """
    started = {}

    def get(kind):
        if kind not in started and kind == "vllm-sim":
            slow = {"max_num_seqs": 1, "max_num_queued_reqs": 1, "decode_tokens_per_s": 20}
            started[kind] = fronts.sim("full-sim", answer_tokens=2000, **slow)
        elif kind not in started:
            flags = ("--max-running-requests", "1", "--max-queued-requests", "0")
            slow = ("--num-tokens", "2000", "--token-interval-s", "0.05")
            started[kind] = fronts.dialect(kind, *flags, *slow, name="full-sglang")
        return started[kind]

    return get


@streamed
@pytest.mark.parametrize("kind", ["vllm-sim", "sglang"])
def test_overload(full_front, kind, is_stream, until):
    """503 with `Retry-After`, although SGLang streams it under a 200."""
    front = full_front(kind)
    with front.client() as client:
        held = _create(client, front, max_tokens=2000, stream=True)
        next(iter(held))
        with pytest.raises(openai.InternalServerError) as caught:
            _create(client, front, stream=is_stream)
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
        assert caught.value.response.headers["retry-after"] == "1"
        held.close()

        def is_free():
            with suppress(openai.InternalServerError):
                _create(client, front, max_tokens=1)
                return True
            return False

        until(is_free, 30.0, "the engine has noticed that its client left")


@pytest.fixture
def switched(front_of):
    """A front whose engine is told how to fail; it is well again afterwards."""
    told = []

    def switch(kind, **switches):
        front = front_of(kind)
        told.append((front, dict.fromkeys(switches)))
        front.switch(**switches)
        return front

    yield switch
    for front, switches in told:
        front.switch(**switches)
        # Failures may have taken the replica out: the next test needs it.
        with front.client() as client:
            _create(client, front)


@streamed
@pytest.mark.parametrize("kind", FAILING)
def test_failing_engine(switched, kind, is_stream):
    """502, and nothing of what the engine said about itself."""
    front = switched(kind, error_status=500)
    with front.client() as client, pytest.raises(openai.InternalServerError) as caught:
        _create(client, front, stream=is_stream)
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_error")
    assert "switched on" not in caught.value.message


@pytest.mark.parametrize("fault", ["die_after_tokens", "fail_after_tokens"])
@pytest.mark.parametrize("kind", FAILING)
def test_stream_that_breaks(switched, kind, fault):
    """What came arrives, then one error: never an end that looks like any other."""
    front = switched(kind, **{fault: 3})
    said = []

    def read(stream):
        for chunk in stream:
            said.extend(one.delta.content for one in chunk.choices if one.delta.content)

    with front.client() as client:
        stream = _create(client, front, max_tokens=8, stream=True)
        with pytest.raises(openai.APIError) as caught:
            read(stream)
    assert len(said) == 3
    assert caught.value.code == "upstream_error"


def test_many_at_once(simulated):
    """A burst of requests is answered, each with its own id."""
    with simulated.client() as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: _create(client, simulated), range(64)))
    assert len({answer.id for answer in answers}) == 64
