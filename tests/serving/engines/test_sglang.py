"""SGLang's dialect: names, ids and priorities in, errors and events out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from serving.engines import dialect_of
from serving.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.engines.base import EngineCall

SGLANG = dialect_of("sglang")
ID = "chatcmpl-01a20e0736ce7c528c83dbd61bc6f738"
CHAT = "/v1/chat/completions"


def test_readiness() -> None:
    """Its `/health` generates for a second and more; `/ready` looks at flags, the pause included."""
    assert SGLANG.health_path == "/ready"


@pytest.mark.parametrize(
    ("name", "parent", "selected"),
    [("m", None, "m"), ("support", "m", "m:support"), ("a b", "org/m", "org/m:a b")],
)
def test_adapters_are_selected_by_base_and_name(
    name: str, parent: str | None, selected: str
) -> None:
    """A bare adapter name would silently be answered by the base."""
    assert SGLANG.engine_name(name, parent) == selected


@pytest.mark.parametrize(
    ("path", "fields", "usage", "sent"),
    [
        (CHAT, {}, False, {"rid": ID}),
        ("/v1/completions", {}, False, {"rid": ID}),
        ("/v1/responses", {"request_id": "forged"}, False, {"rid": ID, "request_id": ID}),
        ("/v1/embeddings", {}, False, {"rid": ID}),
        (CHAT, {"rid": "forged"}, False, {"rid": ID}),
        (CHAT, {"priority": 5}, False, {"priority": -5, "rid": ID}),
        (CHAT, {"priority": -5}, False, {"priority": 5, "rid": ID}),
        (CHAT, {"priority": 0}, False, {"priority": 0, "rid": ID}),
        (CHAT, {"priority": "x"}, False, {"priority": "x", "rid": ID}),
        (CHAT, {"priority": None}, False, {"priority": None, "rid": ID}),
        (CHAT, {"lora_path": None}, False, {"rid": ID}),
        (CHAT, {"x": [1, {"y": 2}]}, False, {"x": [1, {"y": 2}], "rid": ID}),
        (CHAT, {"stream": True}, True,
         {"stream": True, "stream_options": {"include_usage": True}, "rid": ID}),
        (CHAT, {"stream": True, "stream_options": {"continuous_usage_stats": True}}, True,
         {"stream": True, "rid": ID,
          "stream_options": {"continuous_usage_stats": True, "include_usage": True}}),
    ],
)  # fmt: skip
def test_body(
    make_call: Callable[..., EngineCall],
    path: str,
    fields: dict[str, Any],
    usage: bool,
    sent: dict[str, Any],
) -> None:
    """Model and `rid` are ours, the priority is turned round, everything else is the client's."""
    body = json.dumps({"model": "help", **fields}).encode()
    call = make_call(path, "support", "m:support", sent_name="help", add_usage=usage)
    assert json.loads(SGLANG.engine_body(body, call)) == {"model": "m:support", **sent}


def test_adapters_past_our_names_are_refused(make_call: Callable[..., EngineCall]) -> None:
    """`lora_path` would select any adapter under the base's name."""
    with pytest.raises(BadRequest) as raised:
        SGLANG.engine_body(b'{"model":"m","lora_path":"legal"}', make_call())
    assert raised.value.param == "lora_path"


def test_answers_of_the_base_pass_untouched(make_call: Callable[..., EngineCall]) -> None:
    """Only `base:adapter` has to be put right."""
    assert SGLANG.rewriter(make_call()) is None


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (
            b'data: {"id":"1","model":"m:support","choices":[{"text":"\\"model\\":\\"x\\""}]}\n\n',
            b'data: {"id":"1","model":"support","choices":[{"text":"\\"model\\":\\"x\\""}]}\n\n',
        ),
        (
            b'{"model" : "m:support", "choices":[{"model":"deep"}],"model":"late"}',
            b'{"model":"support", "choices":[{"model":"deep"}],"model":"late"}',
        ),
        (b'{"choices":[],"model":"late"}', b'{"choices":[],"model":"late"}'),
        (b"data: [DONE]\n\n", b"data: [DONE]\n\n"),
    ],
)
def test_model_in_answers(make_call: Callable[..., EngineCall], told: bytes, shown: bytes) -> None:
    """Clients read their own name for an adapter; what was generated is never touched."""
    rewrite = SGLANG.rewriter(make_call(name="support", engine_name="m:support"))
    assert rewrite is not None
    assert rewrite(told) == shown


def test_own_events_are_hidden() -> None:
    """`event: sglext_ids` is nothing that an OpenAI client knows."""
    assert SGLANG.hides_event(b'event: sglext_ids\ndata: {"sglext":{}}\n\n')
    assert not SGLANG.hides_event(b'data: {"x":"event: sglext_ids"}\n\n')


@pytest.mark.parametrize(
    ("status", "body", "ours", "code"),
    [
        (400, {"object": "error", "message": "bad top_k", "param": None, "code": 400}, 400, None),
        (400, {"object": "error", "message": "The input (9 tokens) is longer than the model's "
               "context length (5 tokens).", "code": 400}, 400, "context_length_exceeded"),
        (400, {"error": {"message": "native"}}, 400, None),
        (404, {"error": {"message": "The model 'x' does not exist."}}, 404, "model_not_found"),
        (503, {"object": "error", "type": "503", "message": "The request queue is full."}, 503,
         "overloaded"),
        (500, {"object": "error", "message": "boom in /srv/x/y.py"}, 502, "upstream_error"),
        (401, {"error": "Unauthorized"}, 502, "upstream_error"),
    ],
)  # fmt: skip
def test_errors(status: int, body: dict[str, Any], ours: int, code: str | None) -> None:
    """Its shapes, flat, nested and native, become one of ours."""
    error = SGLANG.to_error(status, json.dumps(body).encode(), "public")
    assert (error.status, error.code) == (ours, code)


@pytest.mark.parametrize(
    ("payload", "ours", "retryable"),
    [
        ({"type": "SERVICE_UNAVAILABLE", "message": "full", "code": 503}, 503, True),
        ({"type": "InternalServerError", "message": "boom", "code": 500}, 502, True),
        ({"type": "BadRequestError", "message": "no", "code": 400}, 400, False),
        ({"message": "no code"}, 502, True),
        ({"message": "odd code", "code": "x"}, 502, True),
        ({"message": "odd code", "code": 7}, 502, True),
    ],
)
def test_error_events(payload: dict[str, Any], ours: int, retryable: bool) -> None:
    """The code of an event is a status like any other."""
    event = b"data: %b\n\n" % json.dumps({"error": payload}).encode()
    error = SGLANG.event_error(event, "m")
    assert (error.status, error.retryable) == (ours, retryable)


def test_canary() -> None:
    """One token of the base model."""
    canary = SGLANG.canary("m", SGLANG.default_paths)
    assert canary is not None
    assert canary.path == "/v1/completions"
    assert json.loads(canary.body) == {"model": "m", "prompt": "1", "max_tokens": 1}
