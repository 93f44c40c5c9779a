"""TensorRT-LLM's dialect: what is stripped, mapped and refused; ids, names and errors out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serving.engines import dialect_of
from serving.engines.tensorrt_llm import _KNOWN
from serving.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.engines.base import EngineCall

sys.path.append(str(Path(__file__).parents[2] / "engines"))

from tensorrt_llm_schema import FIELDS

TRT = dialect_of("tensorrt-llm")
ID = "cmpl-01a20e0736ce7c528c83dbd61bc6f738"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(("path", "schema"), [(CHAT, "chat"), (COMPLETIONS, "completion")])
def test_what_we_send_is_what_it_knows(path: str, schema: Any) -> None:
    """No field passes that its schema would refuse."""
    assert _KNOWN[path] <= FIELDS[schema]


@pytest.mark.parametrize(
    ("path", "fields", "sent"),
    [
        (CHAT, {"messages": [], "temperature": 0.5}, {"messages": [], "temperature": 0.5}),
        (CHAT, {"priority": 1, "request_id": "x", "rid": "y", "session_id": "z"}, {}),
        (CHAT, {"store": True, "metadata": {}, "parallel_tool_calls": True, "service_tier": "x"}, {}),
        (CHAT, {"max_completion_tokens": 5}, {"max_tokens": 5}),
        (CHAT, {"max_completion_tokens": 5, "max_tokens": 9}, {"max_tokens": 5}),
        (CHAT, {"max_completion_tokens": None, "max_tokens": 9}, {"max_tokens": 9}),
        (CHAT, {"prompt_logprobs": None, "return_token_ids": False}, {}),
        (CHAT, {"structured_outputs": {"regex": "a+"}}, {"response_format": {"type": "regex", "regex": "a+"}}),
        (CHAT, {"structured_outputs": {"choice": ["a.", "b"]}},
         {"response_format": {"type": "regex", "regex": "(a\\.|b)"}}),
        (CHAT, {"structured_outputs": {"grammar": "root ::= x"}},
         {"response_format": {"type": "ebnf", "ebnf": "root ::= x"}}),
        (CHAT, {"structured_outputs": {"json": {"type": "object"}}},
         {"response_format": {"type": "json_schema",
                              "json_schema": {"name": "answer", "schema": {"type": "object"}}}}),
        (CHAT, {"structured_outputs": None}, {}),
        (COMPLETIONS, {"prompt": "a", "messages": [], "echo": True}, {"prompt": "a", "echo": True}),
        ("/v1/responses", {"input": "a", "whatever": 1, "request_id": "forged"},
         {"input": "a", "whatever": 1, "request_id": ID}),
    ],
)  # fmt: skip
def test_body(
    make_call: Callable[..., EngineCall], path: str, fields: dict[str, Any], sent: dict[str, Any]
) -> None:
    """What it would refuse is left out or has its own name for it; values stay as they are."""
    body = json.dumps({"model": "fast", **fields}).encode()
    call = make_call(path, sent_name="fast", response_id=ID)
    assert json.loads(TRT.engine_body(body, call)) == {"model": "m", **sent}


def test_usage_is_asked_for(make_call: Callable[..., EngineCall]) -> None:
    """As everywhere."""
    sent = TRT.engine_body(b'{"model":"m","stream":true}', make_call(add_usage=True))
    assert json.loads(sent)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_logprobs", 1),
        ("return_token_ids", True),
        ("allowed_token_ids", [1]),
        ("bad_words", ["x"]),
        ("structured_outputs", {"structural_tag": "x"}),
        ("structured_outputs", "x"),
        ("logits_processors", ["x"]),
        ("lora_request", {"lora_name": "a", "lora_int_id": 1, "lora_path": "/etc"}),
    ],
)
def test_what_it_cannot_do_is_refused(
    make_call: Callable[..., EngineCall], name: str, value: object
) -> None:
    """Where leaving a field out would change the answer, the client is told which one."""
    with pytest.raises(BadRequest) as raised:
        TRT.engine_body(json.dumps({"model": "m", name: value}).encode(), make_call(name="pub"))
    assert raised.value.param == name
    assert name in raised.value.message
    assert "pub" in raised.value.message


def test_one_id_for_all_chunks(make_call: Callable[..., EngineCall]) -> None:
    """Ours, with the client's name for the model; ids inside of what was generated stay."""
    rewrite = TRT.rewriter(make_call(COMPLETIONS, "pub", "m", response_id=ID))
    assert rewrite is not None
    told = b'data: {"id":"cmpl-%d","object":"x","model":"m","choices":[{"id":"call-1"}]}\n\n'
    shown = b'data: {"id":"%b","object":"x","model":"pub","choices":[{"id":"call-1"}]}\n\n'
    assert [rewrite(told % number) for number in (1, 2)] == [shown % ID.encode()] * 2
    assert rewrite(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"


def test_other_answers_pass_untouched(make_call: Callable[..., EngineCall]) -> None:
    """Responses have our id already: the engine was given it."""
    assert TRT.rewriter(make_call("/v1/responses")) is None


def _flat(message: str, code: int = 400) -> dict[str, Any]:
    return {
        "object": "error",
        "message": message,
        "type": "BadRequestError",
        "param": None,
        "code": code,
    }


SCHEMA = "[{'type': 'extra_forbidden', 'loc': ('body', 'top_q'), 'msg': 'Extra inputs are not permitted'}]"


@pytest.mark.parametrize(
    ("status", "body", "ours", "code", "retryable"),
    [
        (400, _flat("n must be positive"), 400, None, False),
        (400, _flat("Failed to load LoRA adapter"), 502, "upstream_error", True),
        (400, _flat("CppExecutorError: out of memory"), 502, "upstream_error", True),
        (400, _flat("Internal error in /opt/x/y.cpp"), 502, "upstream_error", True),
        (400, _flat("The sum of prompt length (9) should not exceed max_seq_len (5)"), 400,
         "context_length_exceeded", False),
        (400, {"error": SCHEMA}, 400, None, False),
        (429, _flat("x", 429), 503, "overloaded", True),
        (500, b"Internal Server Error", 502, "upstream_error", True),
    ],
)  # fmt: skip
def test_errors(status: int, body: object, ours: int, code: str | None, retryable: bool) -> None:
    """A 400 is the client's fault or the engine's: the text tells, not the status."""
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    error = TRT.to_error(status, encoded, "public")
    assert (error.status, error.code, error.retryable) == (ours, code, retryable)


def test_schema_errors_are_sentences() -> None:
    """Its report is a string in `error`: the client gets the sentence and the field."""
    error = TRT.to_error(400, json.dumps({"error": SCHEMA}).encode(), "m")
    assert (error.message, error.param) == (
        "Invalid 'top_q': Extra inputs are not permitted.",
        "top_q",
    )


def test_adapters_are_not_selected_by_name() -> None:
    """None is listed, so that no name but the base's is known."""
    assert TRT.engine_name("m", None) == "m"


def test_canary_has_only_known_fields() -> None:
    """It would be refused otherwise, and prove nothing."""
    canary = TRT.canary("m", TRT.default_paths)
    assert canary is not None
    assert set(json.loads(canary.body)) <= FIELDS["completion"]
