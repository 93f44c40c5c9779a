"""vLLM's dialect (0.32; paths below are under `vllm/` in its wheel)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from serving.engines.base import Dialect
from serving.errors import (
    BadRequest,
    ContextTooLong,
    EngineRefused,
    NotOffered,
    Overloaded,
    UnknownModel,
    UpstreamBroken,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serving.config import EngineKind
    from serving.errors import ServingError

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode
_INCLUDE_USAGE = msgspec.Raw(b'{"include_usage":true}')
_TRUE = msgspec.Raw(b"true")

_PATH = re.compile(r"(?<![\w/:.])(?:file://)?(?:/[\w.@+-]+){2,}/?")
_RESPONSES = "/v1/responses"
_CONTEXT_PARAM = "input_tokens"
_CONTEXT_TEXT = re.compile(r"maximum (?:context|model) length|max_model_len|max_tokens.*too large")
_SCHEMA_PARAM = "body."
_SCHEMA_SENTENCE = re.compile(r"'msg': ['\"]([^'\"]+)['\"]")
_MAX_MESSAGE_CHARS = 2000


class Vllm(Dialect):
    """vLLM: takes every field, our request id by header, and tells errors apart by `param`."""

    kind: EngineKind = "vllm"
    health_path = "/health"
    models_path = "/v1/models"
    routes_path = "/openapi.json"
    default_paths = frozenset(
        {
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/tokenize",
            "/detokenize",
        }
    )

    def offered_paths(self, openapi_paths: Iterable[str]) -> frozenset[str]:
        """Only the routes that the model's task supports are mounted, under our names."""
        return frozenset(openapi_paths)

    def request_id_header(self) -> bytes:
        """`X-Request-Id` beats the body's `request_id` (entrypoints/serve/engine/serving.py)."""
        return b"x-request-id"

    def engine_body(
        self,
        body: bytes,
        path: str,
        inference_id: bytes,
        engine_name: str | None,
        *,
        add_usage: bool,
    ) -> bytes:
        """Replaces top-level fields; the values of all others keep their bytes.

        The Responses API takes its response's id from the body alone
        (entrypoints/openai/responses/protocol.py, `request_id`).
        """
        names_response = path == _RESPONSES
        if engine_name is None and not add_usage and not names_response:
            return body
        fields = _decode_fields(body)
        if engine_name is not None:
            fields["model"] = msgspec.Raw(_encode(engine_name))
        if add_usage:
            fields["stream_options"] = _with_usage(fields.get("stream_options"))
        if names_response:
            fields["request_id"] = msgspec.Raw(b'"resp_%b"' % inference_id)
        return _encode(fields)

    def to_error(self, status: int, body: bytes, model: str) -> ServingError:
        """Source: entrypoints/serve/exception_handling."""
        message, param = _read_error(body)
        if status == 404:
            if message == "Not Found":
                return NotOffered(f"The engine that serves '{model}' does not offer this endpoint.")
            return UnknownModel(f"The model '{model}' does not exist.", param="model")
        if status == 503:
            return Overloaded("The engine's queue is full. Try again shortly.")
        if status >= 500 or status < 400:
            return UpstreamBroken("The engine failed while it worked on this request.")
        if param == _CONTEXT_PARAM or (status == 400 and _CONTEXT_TEXT.search(message)):
            return ContextTooLong(message, param=None if param == _CONTEXT_PARAM else param)
        if status in (401, 403):
            return UpstreamBroken("The engine refused the gateway's own API key.")
        return EngineRefused(
            message or "The engine refused this request.", status=status, param=param
        )


def _decode_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """Top-level fields, undecoded; also checks what the gateway's own reading skips: their names."""
    try:
        return _decode_object(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.") from None


def _with_usage(stream_options: msgspec.Raw | None) -> msgspec.Raw:
    """`stream_options` with `include_usage` true and whatever else the client had set."""
    if stream_options is None or bytes(stream_options) == b"null":
        return _INCLUDE_USAGE
    options = _decode_fields(bytes(stream_options))
    options["include_usage"] = _TRUE
    return msgspec.Raw(_encode(options))


def _read_error(body: bytes) -> tuple[str, str | None]:
    """Message and `param` of an error body; paths of the engine's machine are taken out.

    Knows `{"error": {…}}`, `{"error": "…"}`, `{"detail": …}` and the flat `{"message": …}`.
    """
    try:
        decoded: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "", None
    error = decoded.get("error", decoded) if isinstance(decoded, dict) else decoded
    if isinstance(error, str):
        return _redact(error), None
    if not isinstance(error, dict):
        return "", None
    message = str(error.get("message") or error.get("detail") or "")
    param = error.get("param")
    if isinstance(param, str) and param.startswith(_SCHEMA_PARAM):
        # Pydantic's report as a Python literal: its sentences are what a client can use.
        message = "; ".join(_SCHEMA_SENTENCE.findall(message)) or "The request is not valid."
        return f"Invalid '{param[len(_SCHEMA_PARAM) :]}': {message}.", param[len(_SCHEMA_PARAM) :]
    return _redact(message), param if isinstance(param, str) else None


def _redact(message: str) -> str:
    return _PATH.sub("<path>", message)[:_MAX_MESSAGE_CHARS]
