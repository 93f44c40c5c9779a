"""Bytes of events and of error bodies, into the functions that read them.

The first digit chooses the dialect, the second the route; the rest is what the engine sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pieces import cut

from serving.engines import dialect_of
from serving.engines.base import EngineCall
from serving.engines.error_text import read_error
from serving.errors import ServingError
from serving.gateway.answers import error_body, error_event
from serving.gateway.events import EventFilter, is_error_event
from serving.gateway.first_bytes import early_failure, is_decided
from serving.gateway.sse import EventSplitter
from serving.gateway.usage import find_usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.config import EngineKind
    from serving.engines.base import Dialect

KINDS: tuple[EngineKind, ...] = ("vllm", "sglang", "tensorrt-llm")
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
_STATUSES = (302, 400, 401, 404, 409, 422, 429, 500, 503)
_NUM_DIGITS = 2


def check(data: bytes) -> None:
    """Feeds the input to all of them."""
    if len(data) < _NUM_DIGITS:
        return
    kind, path = KINDS[data[0] % len(KINDS)], _PATHS[data[1] % len(_PATHS)]
    payload = data[_NUM_DIGITS:]
    dialect = dialect_of(kind)
    _check_splitter(payload)
    _check_filter(payload, dialect, path)
    _check_errors(payload, dialect)
    usage = find_usage(payload)
    assert usage is None or min(usage) >= 0


def _check_splitter(payload: bytes) -> None:
    splits = [_split([payload]), _split(cut(payload))]
    for events, rest in splits:
        assert b"".join([*events, rest]) == payload, "the pieces are not the input"
    # A carriage return at the edge of a piece may belong to the next line end.
    assert b"\r" in payload or splits[0] == splits[1], "the split matters"


def _split(pieces: Sequence[bytes]) -> tuple[list[bytes], bytes]:
    splitter = EventSplitter()
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return events, splitter.rest


def _check_filter(payload: bytes, dialect: Dialect, path: str) -> None:
    call = EngineCall(path, "id-1", "m", "base:m", "m", add_usage=True)
    for withholds in (False, True):
        whole = _filtered([payload], dialect, call, withholds)
        pieces = _filtered(cut(payload), dialect, call, withholds)
        assert b"\r" in payload or whole == pieces, f"the split matters:\n{whole}\n{pieces}"


def _filtered(
    pieces: Sequence[bytes], dialect: Dialect, call: EngineCall, withholds: bool
) -> tuple[bytes, object, int | None]:
    events = EventFilter(
        withholds_usage=withholds,
        error_shape="anthropic" if call.path == "/v1/messages" else "openai",
        request_id="r",
        dialect=dialect,
        call=call,
    )
    shown = b""
    try:
        for number, piece in enumerate(pieces, 1):
            shown += events.feed(piece, is_last=number == len(pieces))
    except ServingError as error:
        return shown, None, error.status
    events.is_cut_short(b"")
    return shown, events.usage, None if events.error is None else events.error.status


def _check_errors(payload: bytes, dialect: Dialect) -> None:
    read_error(payload)
    is_decided(payload)
    is_error_event(payload)
    failures = [dialect.to_error(status, payload, "m") for status in _STATUSES]
    failures.append(dialect.event_error(payload, "m"))
    early = early_failure(dialect, payload, "m")
    if early is not None:
        failures.append(early)
    for failure in failures:
        assert 400 <= failure.status < 600
        assert error_body(failure, "anthropic", "r").startswith(b"{")
        event = error_event(failure, "openai", "r")
        assert event.count(b"\n") == event.count(b"\n\n") * 2 == 2, "an error is one event"
