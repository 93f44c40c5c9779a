"""vLLM's dialect: bodies in, errors out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engines import dialect_of
from serving.engines.base import EngineCall
from serving.errors import BadRequest, ServingError

VLLM = dialect_of("vllm")
ID = "resp_00"
CHAT = "/v1/chat/completions"


def _body(body: bytes, path: str = CHAT, name: str | None = None, *, usage: bool = False) -> bytes:
    """As the engine gets it; `name` is the engine's where that is not the one that was sent."""
    call = EngineCall(
        path=path,
        response_id=ID,
        public_name="public",
        engine_name=name or "sent",
        sent_name="other" if name is not None else "sent",
        add_usage=usage,
    )
    return VLLM.engine_body(body, call)


def _error(status: int, body: object) -> ServingError:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    return VLLM.to_error(status, encoded, "public")


def test_untouched_body_is_the_same_object() -> None:
    """Nothing to change, nothing copied."""
    body = b'{"model":"m"}'
    assert _body(body) is body


@pytest.mark.parametrize(
    ("body", "name", "usage", "sent"),
    [
        (b'{"model":"a"}', "m", False, b'{"model":"m"}'),
        (b'{ "x" : 1 }', "m", False, b'{"x":1,"model":"m"}'),
        (b'{"model":"a","model":"b"}', "m", False, b'{"model":"m"}'),
        (b'{"model":"a"}', 'm"\n', False, b'{"model":"m\\"\\n"}'),
        (b'{"a":1e400,"b":-0.0,"c":"\\u00e9\\ud83d\\ude00"}', "m", False,
         b'{"a":1e400,"b":-0.0,"c":"\\u00e9\\ud83d\\ude00","model":"m"}'),
        (b'{"stream":true}', None, True, b'{"stream":true,"stream_options":{"include_usage":true}}'),
        (b'{"stream_options":null}', None, True, b'{"stream_options":{"include_usage":true}}'),
        (b'{"stream_options":{"include_usage":false,"x":[1, 2]}}', None, True,
         b'{"stream_options":{"include_usage":true,"x":[1, 2]}}'),
    ],
)  # fmt: skip
def test_rewritten_body(body: bytes, name: str | None, usage: bool, sent: bytes) -> None:
    """Only the top-level fields that have to change do; other values keep their bytes."""
    assert _body(body, name=name, usage=usage) == sent


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(fields=st.dictionaries(st.text(), _values, max_size=6), name=st.text(min_size=1))
def test_any_body_keeps_its_values(fields: dict[str, Any], name: str) -> None:
    """After rewriting, everything but the model is what it was."""
    fields.pop("stream_options", None)
    sent = json.loads(_body(json.dumps(fields).encode(), name=name, usage=True))
    assert sent == {**fields, "model": name, "stream_options": {"include_usage": True}}


@given(st.binary(max_size=60).map(lambda inner: b'{"model":"a",' + inner + b"}"))
def test_bad_bodies_are_bad_requests(body: bytes) -> None:
    """What was let through unread and cannot be taken apart is the client's fault, not a crash."""
    try:
        sent = _body(body, name="m", usage=True)
    except BadRequest:
        return
    assert b'"model":"m"' in sent


def test_responses_api_names_its_response() -> None:
    """Its id comes from the body."""
    sent = json.loads(_body(b'{"model":"m","request_id":"forged"}', "/v1/responses"))
    assert sent == {"model": "m", "request_id": ID}


def _openai(message: str, code: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "X", "param": param, "code": code}}


@pytest.mark.parametrize(
    ("status", "body", "ours", "code"),
    [
        (404, _openai("The model `m` does not exist.", 404, "model"), 404, "model_not_found"),
        (404, {"detail": "Not Found"}, 404, "endpoint_not_offered"),
        (400, _openai("too long", 400, "input_tokens"), 400, "context_length_exceeded"),
        (400, _openai("maximum context length is 5", 400), 400, "context_length_exceeded"),
        (400, _openai("bad", 400, "top_k"), 400, None),
        (422, _openai("bad", 422), 422, None),
        (401, {"error": "Unauthorized"}, 502, "upstream_error"),
        (403, _openai("no", 403), 502, "upstream_error"),
        (503, _openai("full", 503), 503, "overloaded"),
        (500, _openai("dead", 500), 502, "upstream_error"),
        (501, b"", 502, "upstream_error"),
        (301, b"", 502, "upstream_error"),
        (400, b"", 400, None),
        (400, b"<html>", 400, None),
        (400, b"\xff\xfe", 400, None),
        (400, [1], 400, None),
        (400, {"error": None}, 400, None),
        (400, {"object": "error", "message": "flat", "param": "x"}, 400, None),
    ],
)
def test_errors(status: int, body: object, ours: int, code: str | None) -> None:
    """Status and code of ours for each of the engine's."""
    error = _error(status, body)
    assert (error.status, error.code) == (ours, code)
    assert error.message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("No file /srv/models/m/config.json here", "No file <path> here"),
        ("see file:///etc/vllm/x.py", "see <path>"),
        ("'/srv/a b' and \"/home/x/.cache/hf/\"", "'<path> b' and \"<path>\""),
        ("either/or is no path", "either/or is no path"),
        ("see https://docs.vllm.ai/en/latest", "see https://docs.vllm.ai/en/latest"),
        ("x" * 3000, "x" * 2000),
    ],
)
def test_paths_are_taken_out(text: str, shown: str) -> None:
    """Paths of the engine's machine do not reach clients, words and links do."""
    assert _error(400, _openai(text, 400)).message == shown


def test_schema_errors_are_sentences() -> None:
    """Pydantic's report becomes what a client can use, with the field's own name."""
    report = (
        "[{'type': 'int_parsing', 'loc': ('body', 'n'), 'msg': 'Input should be a valid integer'}]"
    )
    error = _error(400, _openai(report, 400, "body.n"))
    assert (error.message, error.param) == ("Invalid 'n': Input should be a valid integer.", "n")


@given(
    status=st.integers(300, 599),
    body=st.binary(max_size=200) | _values.map(lambda v: json.dumps(v).encode()),
)
def test_any_error_is_an_error(status: int, body: bytes) -> None:
    """Whatever an engine answers, there is an error of ours for it."""
    error = VLLM.to_error(status, body, "m")
    assert 400 <= error.status <= 599
    assert error.message
    assert error.param is None or isinstance(error.param, str)
