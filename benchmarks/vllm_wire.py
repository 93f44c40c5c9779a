"""The bytes of vLLM's answers, as vLLM 0.32.0 sends them under uvicorn.

Field order, null fields and framing follow `vllm/entrypoints/openai/*/protocol.py` (responses are
dumped whole, stream chunks with `exclude_unset`). Owns no socket and no time but the `created`
field. Called by `benchmarks/fast_engine.py` and `benchmarks/engine_sim`.
"""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Literal

Endpoint = Literal["chat", "completion"]

WORDS = (" the", " stream", " turns", " a", " wheel", " that", " grinds", " grain")

DONE_EVENT = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"

# Routes that a generating vLLM lists in its OpenAPI document.
ROUTES: dict[str, tuple[str, ...]] = {
    "/health": ("get",),
    "/load": ("get",),
    "/version": ("get",),
    "/metrics": ("get",),
    "/ping": ("get", "post"),
    "/tokenize": ("post",),
    "/detokenize": ("post",),
    "/invocations": ("post",),
    "/v1/models": ("get",),
    "/v1/chat/completions": ("post",),
    "/v1/chat/completions/batch": ("post",),
    "/v1/completions": ("post",),
    "/v1/responses": ("post",),
    "/v1/responses/{response_id}": ("get",),
    "/v1/responses/{response_id}/cancel": ("post",),
    "/v1/messages": ("post",),
    "/v1/messages/count_tokens": ("post",),
}

_REASONS = {200: b"OK", 400: b"Bad Request", 404: b"Not Found"}


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def head(status: int, headers: bytes) -> bytes:
    """Response head as uvicorn writes it; `headers` are whole lines ending in CRLF."""
    date = formatdate(time.time(), usegmt=True).encode()
    return b"HTTP/1.1 %d %b\r\ndate: %b\r\nserver: uvicorn\r\n%b\r\n" % (
        status,
        _REASONS[status],
        date,
        headers,
    )


def sized(status: int, content_type: bytes, body: bytes) -> bytes:
    """Whole response with a content-length."""
    headers = b"content-length: %d\r\ncontent-type: %b\r\n" % (len(body), content_type)
    return head(status, headers) + body


def stream_head() -> bytes:
    """Head of a server-sent event stream."""
    return head(
        200,
        b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n",
    )


def chunk(body: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(body), body)


def event(payload: object) -> bytes:
    """One server-sent event in its own HTTP chunk."""
    return chunk(b"data: %b\n\n" % _compact(payload))


def models(model: str) -> bytes:
    """Body of `GET /v1/models`."""
    card = {
        "id": model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "vllm",
        "root": model,
        "parent": None,
        "max_model_len": 8192,
        "permission": [],
    }
    return _compact({"object": "list", "data": [card]})


def openapi() -> bytes:
    """Body of `GET /openapi.json`: the routes, without schemas."""
    paths: dict[str, dict[str, object]] = {
        path: {method: {} for method in methods} for path, methods in ROUTES.items()
    }
    document = {"openapi": "3.1.0", "info": {"title": "FastAPI", "version": "0.1.0"}}
    return _compact({**document, "paths": paths})


def metrics(model: str, num_running: int) -> bytes:
    """Body of `GET /metrics` with the gauges that routers read."""
    labels = f'{{engine="0",model_name="{model}"}}'
    lines = []
    gauges = (
        ("num_requests_running", num_running),
        ("num_requests_waiting", 0),
        ("kv_cache_usage_perc", 0.0),
    )
    for name, value in gauges:
        lines.append(f"# TYPE vllm:{name} gauge\nvllm:{name}{labels} {float(value)}\n")
    return "".join(lines).encode()


def error(status: int, kind: str, message: str, param: str | None = None) -> bytes:
    """Body of an error, in vLLM's nested shape."""
    fields = {"message": message, "type": kind, "param": param, "code": status}
    return _compact({"error": fields})


def usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int | None]:
    """Token counts in the order of vLLM's `UsageInfo`."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "completion_tokens": num_tokens,
    }


def _choice(endpoint: Endpoint, text: str) -> dict[str, object]:
    tail: dict[str, object] = {
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": None,
    }
    if endpoint == "completion":
        tail |= {"prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None}
        return {"index": 0, "text": text, **tail}
    message = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    return {"index": 0, "message": message, **tail, "routed_experts": None}


def answer(
    endpoint: Endpoint, request_id: str, model: str, num_prompt_tokens: int, num_tokens: int
) -> bytes:
    """Body of a non-streaming answer of `num_tokens` tokens."""
    text = "".join(WORDS[index % len(WORDS)] for index in range(num_tokens))
    details = {"prompt_tokens_details": None, "completion_tokens_details": None}
    body: dict[str, object] = {
        "id": request_id,
        "object": "chat.completion" if endpoint == "chat" else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(endpoint, text)],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": usage(num_prompt_tokens, num_tokens) | details,
    }
    if endpoint == "chat":
        body |= {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
    body |= {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
    return _compact(body)


class StreamWire:
    """The events of one streamed answer, each as its HTTP chunk."""

    def __init__(self, endpoint: Endpoint, request_id: str, model: str) -> None:
        self._endpoint = endpoint
        self._base: dict[str, object] = {
            "id": request_id,
            "object": "chat.completion.chunk" if endpoint == "chat" else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.tokens = tuple(event(self._token(word, None)) for word in WORDS)
        """One event a word; a stream cycles through them."""

    def first(self) -> bytes:
        """The role event that opens a chat stream; nothing for a completion."""
        if self._endpoint == "completion":
            return b""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        tail = {"prompt_token_ids": None, "prompt_text": None}
        return event({**self._base, "choices": [choice], **tail})

    def last(self, counts: dict[str, int | None] | None) -> bytes:
        """Last token with its finish reason, usage if asked for, `[DONE]`, end of body.

        Args:
            counts: Token counts for the usage event, or None to send none.
        """
        parts = [event(self._token(WORDS[0], "length"))]
        if counts is not None:
            parts.append(event({**self._base, "choices": [], "usage": counts}))
        return b"".join((*parts, chunk(DONE_EVENT), LAST_CHUNK))

    def _token(self, word: str, finish_reason: str | None) -> dict[str, object]:
        choice: dict[str, object] = {"index": 0}
        if self._endpoint == "completion":
            choice |= {"text": word, "logprobs": None, "finish_reason": finish_reason}
            choice |= {"stop_reason": None, "prompt_token_ids": None, "token_ids": None}
            tail = {"usage": None, "system_fingerprint": None, "metrics": None}
            return {**self._base, "choices": [choice], **tail}
        choice |= {"delta": {"content": word}, "logprobs": None, "finish_reason": finish_reason}
        if finish_reason is not None:
            choice["stop_reason"] = None
        choice["token_ids"] = None
        return {**self._base, "choices": [choice]}
