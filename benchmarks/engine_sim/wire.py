"""The bytes of the simulated engine's answers, as vLLM 0.32.0 sends them under uvicorn.

Field order and null fields follow vllm/entrypoints/openai/*/protocol.py. Owns no socket. Used by
`answer.py` and `routes.py`; what `benchmarks/vllm_wire.py` has is taken from there.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec

from benchmarks.vllm_wire import usage

if TYPE_CHECKING:
    from benchmarks.engine_sim.errors import SimError
    from benchmarks.engine_sim.request import Endpoint

JSON = b"application/json"
FINGERPRINT = "vllm-0.32.0-sim"
_encode = msgspec.json.Encoder().encode
_DETAILS = {"prompt_tokens_details": None, "completion_tokens_details": None}


class Clock:
    """The date header, written once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._head = b""

    def head(self, status: int) -> bytes:
        """Status line, date and server, as uvicorn writes them."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._head = f"date: {formatdate(second, usegmt=True)}\r\nserver: uvicorn\r\n".encode()
        return b"HTTP/1.1 %d %b\r\n%b" % (status, _PHRASES[status], self._head)

    def sized(self, status: int, body: bytes, content_type: bytes | None = JSON) -> bytes:
        """A whole response."""
        kind = b"" if content_type is None else b"content-type: %b\r\n" % content_type
        return b"%bcontent-length: %d\r\n%b\r\n%b" % (self.head(status), len(body), kind, body)

    def json(self, status: int, payload: object) -> bytes:
        """A whole JSON response."""
        return self.sized(status, _encode(payload))

    def error(self, error: SimError) -> bytes:
        """An error in vLLM's nested shape."""
        fields = {"message": error.message, "type": error.kind, "param": error.param}
        return self.json(error.status, {"error": {**fields, "code": error.status}})

    def stream_head(self) -> bytes:
        """Head of a stream."""
        return self.head(200) + (
            b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )


_PHRASES = {int(one): one.phrase.encode() for one in HTTPStatus}


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def whole(
    endpoint: Endpoint,
    base: dict[str, object],
    choices: list[tuple[str, str]],
    num_prompt_tokens: int,
    num_tokens: int,
) -> bytes:
    """Body of an answer that is not streamed.

    Args:
        endpoint: Which API.
        base: id, object, created, model.
        choices: Text and finish reason of each.
        num_prompt_tokens: For the usage.
        num_tokens: For the usage.
    """
    body: dict[str, object] = {
        **base,
        "choices": [
            _whole_choice(endpoint, index, text, reason)
            for index, (text, reason) in enumerate(choices)
        ],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": usage(num_prompt_tokens, num_tokens) | _DETAILS,
    }
    if endpoint == "chat":
        body |= {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
    body |= {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
    return _encode(body)


def _whole_choice(endpoint: Endpoint, index: int, text: str, reason: str) -> dict[str, object]:
    ends = {"logprobs": None, "finish_reason": reason, "stop_reason": None, "token_ids": None}
    if endpoint == "completion":
        rest = {"prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None}
        return {"index": index, "text": text, **ends, **rest}
    message = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    return {"index": index, "message": message, **ends, "routed_experts": None}


class StreamWire:
    """The events of one stream, each in an HTTP chunk of its own."""

    __slots__ = ("_base", "_endpoint", "_prefix")

    def __init__(self, endpoint: Endpoint, base: dict[str, object]) -> None:
        """Prepares what all its events begin with.

        Args:
            endpoint: Which API.
            base: id, object, created, model.
        """
        self._endpoint = endpoint
        self._base = base
        self._prefix = _encode(base)[:-1]

    def role(self, index: int) -> bytes:
        """The event that opens a choice of a chat."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        tail = {"prompt_token_ids": None, "prompt_text": None}
        return self._event({**self._base, "choices": [choice], **tail})

    def token(
        self, index: int, text: bytes, reason: str | None, counts: dict[str, int | None] | None
    ) -> bytes:
        """One token.

        Args:
            index: Of the choice.
            text: Its text, as in a JSON string.
            reason: With the last token, why it is the last.
            counts: Usage so far, where every event shall have it.
        """
        told = b"null" if reason is None else b'"%b"' % reason.encode()
        if self._endpoint == "chat":
            ends = b'"stop_reason":null,' if reason is not None else b""
            choice = (
                b'{"index":%d,"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b,%b'
                % (
                    index,
                    text,
                    told,
                    ends,
                )
            )
            body = b'%b,"choices":[%b"token_ids":null}]' % (self._prefix, choice)
        else:
            body = (
                b'%b,"choices":[{"index":%d,"text":"%b","logprobs":null,"finish_reason":%b,'
                b'"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]'
                % (self._prefix, index, text, told)
            )
        tail = b"" if counts is None else b',"usage":%b' % _encode(counts)
        return _chunk(b"data: %b%b}\n\n" % (body, tail))

    def usage(self, counts: dict[str, int | None]) -> bytes:
        """The event that has no choices."""
        tail = {"usage": counts, "system_fingerprint": FINGERPRINT}
        return self._event({**self._base, "choices": [], **tail})

    def _event(self, payload: object) -> bytes:
        return _chunk(b"data: %b\n\n" % _encode(payload))
