"""One client connection that sends requests one after another and judges every response.

Owns parsing, counting of events and the verdict; never decides what to send or when, which is the
load generator's (`benchmarks/load.py`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import httptools
import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

_EVENT_END = b"\n\n"
_DONE_EVENT = b"data: [DONE]"


class Usage(msgspec.Struct):
    """Token counts of a whole answer."""

    completion_tokens: int


class Answer(msgspec.Struct):
    """What is checked of a whole answer."""

    choices: list[dict[str, msgspec.Raw]]
    usage: Usage


class StreamEvent(msgspec.Struct):
    """What is checked of a streamed event."""

    choices: list[dict[str, msgspec.Raw]]


_decode_answer = msgspec.json.Decoder(Answer).decode
_decode_event = msgspec.json.Decoder(StreamEvent).decode


class Request(msgspec.Struct, frozen=True):
    """A prepared request and what a right response to it has."""

    wire: bytes
    """Request line, headers and body."""
    num_tokens: int
    num_events: int = 0
    """Server-sent events of the response, `[DONE]` included; 0 for a whole answer."""


class Outcome(msgspec.Struct, frozen=True):
    """How one request ended."""

    scheduled_s: float
    """When it should have been sent, by `time.monotonic()`."""
    finished_s: float
    failure: str | None
    """What was wrong, in a few words; None for a right response."""


def judge_answer(body: bytes, num_tokens: int) -> str | None:
    """What is wrong with a whole answer, or None."""
    try:
        answer = _decode_answer(body)
    except msgspec.MsgspecError:
        return "body is not a completion"
    if len(answer.choices) != 1 or answer.usage.completion_tokens != num_tokens:
        return f"answer of {answer.usage.completion_tokens} tokens instead of {num_tokens}"
    return None


def judge_stream(body: bytes, num_events: int) -> str | None:
    """What is wrong with the whole body of an event stream, or None."""
    events = body.split(_EVENT_END)
    if events.pop() != b"":
        return "stream ends within an event"
    if len(events) != num_events:
        return f"stream of {len(events)} events instead of {num_events}"
    if events.pop() != _DONE_EVENT:
        return "stream does not end in [DONE]"
    for event in events:
        name, _, payload = event.partition(b": ")
        try:
            _decode_event(payload)
        except msgspec.MsgspecError:
            return "event is not a completion chunk"
        if name != b"data":
            return "event without data"
    return None


class ClientConnection(asyncio.Protocol):
    """A keep-alive HTTP/1.1 connection with at most one request in flight."""

    def __init__(self, on_end: Callable[[ClientConnection, Outcome], None]) -> None:
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._request: Request | None = None
        self._scheduled_s = 0.0
        self._parts: list[bytes] = []
        self._ends_in_newline = False
        self.num_events = 0
        """Events received on this connection since it was opened."""

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent without connecting again."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def is_busy(self) -> bool:
        """Whether a request is in flight."""
        return self._request is not None

    def send(self, request: Request, scheduled_s: float) -> None:
        """Sends a request on an open connection that has none in flight."""
        self._request = request
        self._scheduled_s = scheduled_s
        self._parts = []
        self._ends_in_newline = False
        if self._transport is None or self._transport.is_closing():
            self._end("connection closed before the request")
            return
        self._transport.write(request.wire)

    def abandon(self, failure: str) -> None:
        """Ends what is in flight as failed and closes the connection."""
        self._end(failure)
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Closes an idle connection."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = transport  # type: ignore[assignment]
        self._parser = httptools.HttpResponseParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop. A response that was not complete is a failure."""
        self._transport = None
        self._end("connection closed within a response" if self._parts else "no response")

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.abandon(f"not HTTP: {error}")

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._parts.append(body)
        request = self._request
        if request is not None and request.num_events:
            # The two newlines of an event's end may come in two pieces.
            self.num_events += body.count(_EVENT_END)
            if self._ends_in_newline and body[0] == 0x0A:
                self.num_events += 1
            self._ends_in_newline = body[-1] == 0x0A and body[-2:] != _EVENT_END

    def on_message_complete(self) -> None:
        """Called by the parser."""
        request = self._request
        if request is None:
            self.abandon("response without a request")
            return
        status = self._parser.get_status_code()
        body = b"".join(self._parts)
        if status != 200:
            failure: str | None = f"status {status}"
        elif request.num_events:
            failure = judge_stream(body, request.num_events)
        else:
            failure = judge_answer(body, request.num_tokens)
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
        self._end(failure)

    def _end(self, failure: str | None) -> None:
        if self._request is None:
            return
        self._request = None
        self._on_end(self, Outcome(self._scheduled_s, time.monotonic(), failure))
