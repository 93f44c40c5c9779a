"""Cutting a byte stream into events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import UpstreamBroken
from serving.gateway.sse import MAX_EVENT_BYTES, EventSplitter, chunk

_pieces = st.lists(
    st.binary(max_size=6) | st.sampled_from([b"\n", b"\r", b"\n\n", b"\r\n\r\n", b"data: x\n\n"]),
    max_size=30,
)


def _split(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = EventSplitter()
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return events, splitter.rest


@given(_pieces)
def test_events_do_not_depend_on_the_split(pieces: list[bytes]) -> None:
    """Any split of the bytes gives the same events and the same rest."""
    whole = b"".join(pieces)
    assert _split(pieces) == _split([whole])
    assert _split([whole[at : at + 1] for at in range(len(whole))]) == _split([whole])


@given(_pieces)
def test_nothing_is_lost(pieces: list[bytes]) -> None:
    """Events and rest put together are the input."""
    events, rest = _split(pieces)
    assert b"".join(events) + rest == b"".join(pieces)


@given(_pieces)
def test_each_event_ends_at_its_first_empty_line(pieces: list[bytes]) -> None:
    """No event holds an empty line but at its end."""
    events, rest = _split(pieces)
    for event in events:
        assert event.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
        assert _split([event[:-1]]) == ([], event[:-1])
    assert not any(mark in rest for mark in (b"\n\n", b"\r\n\r\n", b"\r\r"))


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [b"data: a\n\n", b"data: b\n\n"]),
        (b"data: a\r\n\r\ndata: b\n\n", [b"data: a\r\n\r\n", b"data: b\n\n"]),
        (b"data: a\r\rdata: b\r\r", [b"data: a\r\r", b"data: b\r\r"]),
        (b"event: x\ndata: a\n\n: c\n\n", [b"event: x\ndata: a\n\n", b": c\n\n"]),
        (b"data: a\n", []),
    ],
)
def test_known_streams(stream: bytes, events: list[bytes]) -> None:
    """All three line ends of the standard end an event."""
    assert _split([stream])[0] == events


def test_event_size_is_bounded() -> None:
    """An event that does not end is refused, not held."""
    splitter = EventSplitter()
    splitter.feed(b"x" * MAX_EVENT_BYTES)
    with pytest.raises(UpstreamBroken):
        splitter.feed(b"x")


def test_chunk() -> None:
    """Size in hexadecimal."""
    assert chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"
