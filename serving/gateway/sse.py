"""Server-sent events as bytes: where one ends, and which ones a relay must look at.

Source: WHATWG HTML, section 9.2 "Server-sent events". Pure functions and one small buffer; the
relay's fast path uses only the constants.
"""

from __future__ import annotations

from serving.errors import UpstreamBroken

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""An event larger than this is refused: it would have to be held in memory."""

CHUNKED_EVENT_END = b"\n\n\r\n"
"""How a block ends when it ends with an event and with the HTTP chunk that carries it.

JSON has no raw line feed, so these bytes cannot stand inside an event's data."""

USAGE_MARK = b'"usage":{'
ERROR_MARK = b'"error":'
"""Unescaped quotes: neither can be part of generated text, which is inside a JSON string."""

DONE_MARK = b"data: [DONE]"
"""OpenAI's last event of a chat or completion stream."""

NO_CHOICES_MARK = b'"choices":[]'

_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


class EventSplitter:
    """Cuts a byte stream into whole events, however it was split on the way.

    The pieces put together again are the stream: nothing is trimmed or normalised.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """What has come of an event that is not complete yet."""
        return self._rest

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next bytes.

        Returns:
            The events that are complete now, each with the empty line that ends it.

        Raises:
            UpstreamBroken: If one event exceeds `MAX_EVENT_BYTES`.
        """
        buffered = self._rest + data if self._rest else data
        events: list[bytes] = []
        start = 0
        while (end := _event_end(buffered, start)) >= 0:
            events.append(buffered[start:end])
            start = end
        self._rest = buffered[start:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise UpstreamBroken("The engine sent an event that is too large to relay.")
        return events


def _event_end(buffered: bytes, start: int) -> int:
    """Index after the first empty line from `start` on, or -1."""
    end = -1
    for mark in _ENDS:
        # No further than the end found before: a burst of events is searched once, not once an event.
        at = buffered.find(mark, start) if end < 0 else buffered.find(mark, start, end)
        if at >= 0:
            end = at + len(mark)
    return end


def chunk(payload: bytes) -> bytes:
    """One HTTP chunk (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK = b"0\r\n\r\n"
