"""The response on its way from a replica to its client, from the first byte on.

Two relays: one for bodies, one for event streams. Bytes pass as they come; a stream's blocks of whole
events pass without being touched, only what needs a look (usage, errors, pieces of an event) is
taken apart. A relay never decides about failures: it tells its exchange.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from time import monotonic
from typing import TYPE_CHECKING

from serving.errors import ServingError, UpstreamBroken
from serving.gateway import answers, metrics
from serving.gateway.events import EventFilter
from serving.gateway.sse import CHUNKED_EVENT_END, ERROR_MARK, LAST_CHUNK, USAGE_MARK, chunk
from serving.gateway.usage import find_usage

if TYPE_CHECKING:
    from serving.engines.base import EngineCall
    from serving.gateway.exchange import Exchange
    from serving.gateway.upstream import UpstreamConnection
    from serving.gateway.usage import Usage

_USAGE_TAIL_BYTES = 2048
_CHUNKED = b"transfer-encoding: chunked\r\n"
_NO_CACHE = b"cache-control: no-cache\r\n"
_ITL_BOUNDS_S = metrics.ITL_BOUNDS_S
_RESPONSE_BYTES = metrics.RESPONSE_BYTES


class Relay(ABC):
    """What both relays share: framing towards the client, and the end.

    Attributes:
        last_at: `time.monotonic()` of the last bytes from the replica.
        num_events: Events relayed so far.
        usage: Token counts, once the engine has sent them.
    """

    __slots__ = ("_exchange", "_frames", "_series", "_upstream", "last_at", "num_events", "usage")

    def __init__(self, exchange: Exchange, upstream: UpstreamConnection) -> None:
        self._exchange = exchange
        self._upstream = upstream
        self._series = exchange.series
        self._frames = False
        self.last_at = monotonic()
        self.num_events = 0
        self.usage: Usage | None = None

    def upstream_failed(self, error: ServingError) -> None:
        """The replica's bytes stopped making sense."""
        self._exchange.break_off(error)

    def upstream_lost(self) -> None:
        """The replica closed: the end of a close-delimited body, else a failure."""
        if self._upstream.is_close_delimited:
            self._upstream.is_complete = True
            self.on_block(b"")
        else:
            self._exchange.report_broken()
            self._exchange.break_off(
                UpstreamBroken("The engine closed the connection in the middle of its response.")
            )

    @abstractmethod
    def on_block(self, block: bytes) -> None:
        """The next bytes from the replica; `upstream.parts` has them dechunked."""

    def counted_tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens; of a stream cut off before its usage, a token an event."""
        return (0, self.num_events) if self.usage is None else self.usage

    def break_off(self, error: ServingError) -> bool:
        """Tells the client, where the response still allows it, that it stays incomplete.

        Returns:
            Whether the client can know; if not, its connection has to be reset.
        """
        return False

    def _head(self, framing: bytes) -> bytes:
        request, upstream = self._exchange.request, self._upstream
        content_type = upstream.headers.get(b"content-type", answers.JSON)
        return answers.head(
            request, upstream.status, content_type, framing, self._exchange.worker.date
        )

    def _unsized_framing(self) -> bytes:
        """Framing of a body of unknown length; to HTTP/1.0 it ends with the connection."""
        request = self._exchange.request
        if request.is_http10:
            request.keep_alive = False
            return b""
        self._frames = True
        return _CHUNKED

    def _framed(self, payload: bytes) -> bytes:
        if not self._frames:
            return payload
        framed = chunk(payload) if payload else b""
        return framed + LAST_CHUNK if self._upstream.is_complete else framed

    def _write(self, payload: bytes) -> None:
        if payload:
            self._series.add(_RESPONSE_BYTES, len(payload))
            self._exchange.client.write(payload)


class BodyRelay(Relay):
    """A response that is not a stream of events."""

    __slots__ = ("_tail",)

    def __init__(self, exchange: Exchange, upstream: UpstreamConnection) -> None:
        super().__init__(exchange, upstream)
        self._tail = b""

    def begin(self, first: bytes, block: bytes) -> None:
        """Writes the head with what has come of the body.

        Args:
            first: The body so far.
            block: The bytes that came last.
        """
        length = self._upstream.headers.get(b"content-length")
        framing = self._unsized_framing() if length is None else b"content-length: %b\r\n" % length
        self._pass_on(self._head(framing), first)

    def on_block(self, block: bytes) -> None:
        """Passes the next part of the body on."""
        parts = self._upstream.parts
        self._pass_on(b"", parts[0] if len(parts) == 1 else b"".join(parts))

    def _pass_on(self, head: bytes, body: bytes) -> None:
        self.last_at = monotonic()
        self._write(head + self._framed(body))
        window = self._tail + body if self._tail else body
        # vLLM may write long fields (`prompt_logprobs`) after the usage.
        at = window.rfind(USAGE_MARK)
        self._tail = window[at : at + _USAGE_TAIL_BYTES] if at >= 0 else window[-_USAGE_TAIL_BYTES:]
        if self._upstream.is_complete:
            self.usage = find_usage(self._tail)
            self._exchange.complete()


class StreamRelay(Relay):
    """A stream of server-sent events."""

    __slots__ = (
        "_client_write",
        "_events",
        "_is_fast",
        "_itl_at",
        "_itl_sum_at",
        "_last_block",
        "_own_event_mark",
        "_sent_at",
        "_values",
    )

    def __init__(self, exchange: Exchange, upstream: UpstreamConnection, call: EngineCall) -> None:
        super().__init__(exchange, upstream)
        request = exchange.request
        self._events = EventFilter(
            withholds_usage=call.add_usage,
            error_shape=request.error_shape,
            request_id=request.request_id.decode(),
            dialect=upstream.replica.dialect,
            call=call,
        )
        self._is_fast = False
        self._last_block = b""
        self._own_event_mark = upstream.replica.dialect.own_event_mark
        self._client_write = exchange.client.write
        # The fast path counts without a call: these are the places of its counters.
        self._values = self._series.values
        self._itl_at = self._series.base + metrics.ITL
        self._itl_sum_at = self._series.base + metrics.ITL_SUM
        self._sent_at = self._series.base + _RESPONSE_BYTES

    def begin(self, first: bytes, block: bytes) -> None:
        """Writes the head with the first events.

        Args:
            first: The body so far.
            block: The bytes that came last.
        """
        self._series.observe_ttft(self.last_at - self._exchange.request.received_at)
        self._filter(self._head(_NO_CACHE + self._unsized_framing()), first, block)

    def on_block(self, block: bytes) -> None:
        """The next bytes of the stream. Whole events in whole chunks pass as they are."""
        now = monotonic()
        waited_s = now - self.last_at
        self.last_at = now
        values = self._values
        values[self._itl_at + bisect_left(_ITL_BOUNDS_S, waited_s)] += 1
        values[self._itl_sum_at] += waited_s
        if (
            self._is_fast
            and block.endswith(CHUNKED_EVENT_END)
            # The last line end is the chunk's and not a piece of what the chunk carries.
            and self._upstream.parts[-1].endswith(b"\n\n")
            and USAGE_MARK not in block
            and ERROR_MARK not in block
            and (self._own_event_mark is None or self._own_event_mark not in block)
            and not self._upstream.is_complete
        ):
            write = self._client_write
            write(block)
            self._last_block = block
            self.num_events += 1
            values[self._sent_at] += len(block)
        else:
            self._filter(b"", b"".join(self._upstream.parts), block)

    def _filter(self, head: bytes, body: bytes, block: bytes) -> None:
        """The slow path: takes the bytes apart into events and frames what the client shall see."""
        upstream, events = self._upstream, self._events
        try:
            payload = events.feed(body, is_last=upstream.is_complete)
        except ServingError as error:
            self._exchange.break_off(error)
            return
        self.num_events += events.num_relayed
        self.usage = events.usage
        if upstream.is_complete:
            self._end(head, payload)
            return
        self._write(head + self._framed(payload))
        # Between two events, and between two chunks, the engine's own chunks may pass again.
        self._is_fast = (
            self._frames
            and events.may_pass_blocks
            and block.endswith(CHUNKED_EVENT_END)
            and b"transfer-encoding" in upstream.headers
        )

    def _end(self, head: bytes, payload: bytes) -> None:
        """The last bytes of the stream, unless what should have been last never came."""
        if not self._events.is_cut_short(self._last_block):
            self._write(head + self._framed(payload))
            self._exchange.complete(self._events.error)
            return
        # Half an event would swallow the error event that comes after it.
        payload = payload.removesuffix(self._events.rest)
        framed = chunk(payload) if self._frames and payload else payload
        self._write(head + framed)
        self._exchange.report_broken()
        self._exchange.break_off(UpstreamBroken("The engine ended its response too early."))

    def break_off(self, error: ServingError) -> bool:
        """Ends the stream with one error event."""
        if not self._frames:
            return False
        request = self._exchange.request
        shape, request_id = request.error_shape, request.request_id.decode()
        self._write(chunk(answers.error_event(error, shape, request_id)) + LAST_CHUNK)
        return True
