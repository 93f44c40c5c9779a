"""The gateway's `/metrics` beside what its clients and its engine counted."""

import uuid

import openai
import pytest

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"
PROMPT_TOKENS, COMPLETION_TOKENS = (
    "headrace_prompt_tokens_total",
    "headrace_completion_tokens_total",
)
TTFT = "headrace_time_to_first_token_seconds"
ITL = "headrace_inter_token_latency_seconds"
DURATION = "headrace_request_duration_seconds"


class Growth:
    """How much metrics have grown since this was made."""

    def __init__(self, server, names, **labels):
        self.server, self.labels = server, labels
        self.before = {name: server.metric(name, **labels) for name in names}

    def __getitem__(self, name):
        return self.server.metric(name, **self.labels) - self.before[name]


@pytest.fixture
def exact(gateway, question):
    """Arguments of a request whose number of tokens is known."""
    return {
        "model": gateway.model,
        "messages": question,
        "max_tokens": 7,
        "extra_body": {"ignore_eos": True, "cache_salt": uuid.uuid4().hex},
    }


def test_tokens_of_a_whole_answer(client, gateway, exact):
    """Tokens in and out are those of the usage that the client saw."""
    growth = Growth(gateway, [PROMPT_TOKENS, COMPLETION_TOKENS], endpoint=CHAT)
    usage = client.chat.completions.create(**exact).usage
    assert usage.completion_tokens == 7
    assert growth[PROMPT_TOKENS] == usage.prompt_tokens
    assert growth[COMPLETION_TOKENS] == 7


@pytest.mark.parametrize("is_asked", [True, False], ids=["asked", "not asked"])
def test_tokens_of_a_stream(client, gateway, exact, is_asked):
    """A stream's tokens are counted whether or not its client asked for the usage."""
    growth = Growth(gateway, [PROMPT_TOKENS, COMPLETION_TOKENS], endpoint=CHAT)
    options = {"stream_options": {"include_usage": True}} if is_asked else {}
    chunks = list(client.chat.completions.create(stream=True, **options, **exact))
    if is_asked:
        assert chunks[-1].usage.prompt_tokens == 37
        assert chunks[-1].usage.completion_tokens == 7
    assert growth[PROMPT_TOKENS] == 37
    assert growth[COMPLETION_TOKENS] == 7


def test_tokens_of_two_choices(client, gateway, exact):
    """Both choices are counted, the prompt once."""
    growth = Growth(gateway, [PROMPT_TOKENS, COMPLETION_TOKENS], endpoint=CHAT)
    whole = client.chat.completions.create(n=2, **exact)
    assert len(list(client.chat.completions.create(n=2, stream=True, **exact))) > 2
    assert whole.usage.completion_tokens == 14
    assert growth[PROMPT_TOKENS] == 2 * 37
    assert growth[COMPLETION_TOKENS] == 2 * 14


def test_tokens_of_responses(client, gateway):
    """Tokens of responses, whole and streamed, are counted under their own endpoint."""
    growth = Growth(gateway, [PROMPT_TOKENS, COMPLETION_TOKENS], endpoint="/v1/responses")
    asked = {"model": gateway.model, "input": "Hi", "max_output_tokens": 5}
    usages = [client.responses.create(**asked).usage]
    stream = client.responses.create(stream=True, **asked)
    usages += [event.response.usage for event in stream if event.type == "response.completed"]
    assert len(usages) == 2
    assert growth[PROMPT_TOKENS] == sum(usage.input_tokens for usage in usages)
    assert growth[COMPLETION_TOKENS] == sum(usage.output_tokens for usage in usages)


def test_tokens_of_messages(claude, engine, gateway, question):
    """So are those of messages, with the part of the prompt that Anthropic counts as cached."""
    growth = Growth(gateway, [PROMPT_TOKENS, COMPLETION_TOKENS], endpoint="/v1/messages")
    theirs = Growth(engine, ["vllm:prompt_tokens_total", "vllm:generation_tokens_total"])
    asked = {"model": gateway.model, "max_tokens": 5, "messages": question}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert growth[PROMPT_TOKENS] == theirs["vllm:prompt_tokens_total"] == 2 * 37
    assert growth[COMPLETION_TOKENS] == theirs["vllm:generation_tokens_total"]
    assert growth[COMPLETION_TOKENS] == whole.usage.output_tokens + final.usage.output_tokens


def test_tokens_of_completions(client, gateway):
    """And those of completions, of all prompts together."""
    growth = Growth(gateway, [PROMPT_TOKENS, COMPLETION_TOKENS], endpoint="/v1/completions")
    usage = client.completions.create(
        model=gateway.model, prompt=["One", "Two"], max_tokens=5
    ).usage
    assert growth[PROMPT_TOKENS] == usage.prompt_tokens
    assert growth[COMPLETION_TOKENS] == usage.completion_tokens


def test_tokens_are_the_engine_s(client, engine, gateway, exact):
    """Over a few requests of each kind, gateway and engine count the same."""
    ours = Growth(gateway, [PROMPT_TOKENS, COMPLETION_TOKENS])
    theirs = Growth(engine, ["vllm:prompt_tokens_total", "vllm:generation_tokens_total"])
    for is_stream in (False, True, False, True):
        answer = client.chat.completions.create(stream=is_stream, **exact)
        if is_stream:
            assert len(list(answer)) > 3
    assert ours[PROMPT_TOKENS] == theirs["vllm:prompt_tokens_total"] == 4 * 37
    assert ours[COMPLETION_TOKENS] == theirs["vllm:generation_tokens_total"] == 4 * 7


def test_latencies_are_counted(client, engine, gateway, exact):
    """Each stream has one time to first token and one time between any two events."""
    labels = {"endpoint": CHAT, "model": gateway.model, "replica": engine.name}
    names = [f"{TTFT}_count", f"{TTFT}_sum", f"{ITL}_count", f"{ITL}_sum", f"{DURATION}_sum"]
    growth = Growth(gateway, [*names, f"{DURATION}_count"], **labels)
    client.chat.completions.create(**exact)
    assert growth[f"{TTFT}_count"] == growth[f"{ITL}_count"] == 0
    assert growth[f"{DURATION}_count"] == 1
    whole_s = growth[f"{DURATION}_sum"]
    num_chunks = sum(1 for _ in client.chat.completions.create(stream=True, **exact))
    assert growth[f"{TTFT}_count"] == 1
    # Events that came together are one; the end of the stream follows the last chunk.
    assert 0 < growth[f"{ITL}_count"] <= num_chunks + 2
    assert growth[f"{DURATION}_count"] == 2
    stream_s = growth[f"{DURATION}_sum"] - whole_s
    assert 0 < growth[f"{TTFT}_sum"] < stream_s
    assert growth[f"{TTFT}_sum"] + growth[f"{ITL}_sum"] <= stream_s


def test_requests_and_errors_are_counted(client, engine, gateway, exact):
    """A request is counted once, by its status, alias and replica."""
    gateway_names = ["headrace_requests_total", "headrace_errors_total"]
    ok = Growth(gateway, gateway_names[:1], code="200", model=gateway.alias, replica=engine.name)
    bad = Growth(gateway, gateway_names[:1], code="400", model=gateway.model, replica=engine.name)
    errors = Growth(gateway, gateway_names[1:], model=gateway.model, replica=engine.name)
    client.chat.completions.create(**{**exact, "model": gateway.alias})
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**exact, temperature=-1)
    assert ok["headrace_requests_total"] == 1
    assert bad["headrace_requests_total"] == 1
    assert errors["headrace_errors_total"] == 1
    assert gateway.metric("headrace_replica_healthy", replica=engine.name) == 1


def test_bytes_are_counted(client, gateway, exact):
    """Bytes in are those of the bodies."""
    growth = Growth(gateway, ["headrace_request_bytes_total", "headrace_response_bytes_total"])
    raw = client.chat.completions.with_raw_response.create(**exact)
    assert growth["headrace_request_bytes_total"] == len(raw.http_request.content)
    assert growth["headrace_response_bytes_total"] > len(raw.content)
