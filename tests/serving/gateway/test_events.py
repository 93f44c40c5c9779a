"""The events of one stream, in each engine's dialect."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from base_server import DONE
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import event

from serving.engines import dialect_of
from serving.engines.base import EngineCall
from serving.errors import UpstreamBroken
from serving.gateway.events import EventFilter, is_error_event

if TYPE_CHECKING:
    from serving.config import EngineKind

CHAT = "/v1/chat/completions"
TEXT = event({"id": "x", "model": "m", "choices": [{"delta": {"content": "a"}}]})
USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
OWN = b'event: sglext_ids\ndata: {"choices":[],"sglext":{}}\n\n'
ERROR = event({"error": {"message": "secret", "code": 500}})


def _filter(
    kind: EngineKind = "vllm",
    path: str = CHAT,
    engine_name: str = "m",
    *,
    withholds_usage: bool = False,
) -> EventFilter:
    call = EngineCall(path, "chatcmpl-ours", "pub", engine_name, "pub", add_usage=withholds_usage)
    return EventFilter(
        withholds_usage=withholds_usage,
        error_shape="openai",
        request_id="r",
        dialect=dialect_of(kind),
        call=call,
    )


@pytest.mark.parametrize(
    ("path", "stream", "cut_short"),
    [
        (CHAT, TEXT + DONE, False),
        (CHAT, TEXT, True),
        (CHAT, b"", True),
        (CHAT, TEXT + b"data: [DONE]", False),
        (CHAT, TEXT + ERROR, False),
        ("/v1/completions", TEXT, True),
        ("/v1/responses", TEXT, False),
        ("/v1/messages", TEXT, False),
    ],
)
def test_missing_done(path: str, stream: bytes, cut_short: bool) -> None:
    """A chat or completion without its `[DONE]` is a broken one; other APIs have none."""
    events = _filter(path=path)
    events.feed(stream, is_last=True)
    assert events.is_cut_short(b"") is cut_short
    assert events.is_cut_short(b"f\r\ndata: [DONE]\n\n\r\n") is False


def test_withheld_usage() -> None:
    """Counted and not shown where it was our wish; shown where it was the client's."""
    events = _filter(withholds_usage=True)
    assert events.feed(TEXT + USAGE + DONE, is_last=True) == TEXT + DONE
    assert (events.usage, events.num_relayed) == ((7, 3), 2)
    assert _filter().feed(USAGE, is_last=False) == USAGE


@pytest.mark.parametrize(
    ("kind", "shown"), [("sglang", TEXT), ("vllm", OWN + TEXT), ("tensorrt-llm", None)]
)
def test_own_events_of_sglang(kind: EngineKind, shown: bytes | None) -> None:
    """Withheld where they are that engine's."""
    if shown is not None:
        assert _filter(kind).feed(OWN + TEXT, is_last=False) == shown


@pytest.mark.parametrize(
    ("kind", "engine_name", "is_untouched"),
    [
        ("vllm", "m", True),
        ("sglang", "pub", True),
        ("sglang", "m:pub", False),
        ("tensorrt-llm", "m", False),
    ],
)
def test_who_needs_every_event_rewritten(
    kind: EngineKind, engine_name: str, is_untouched: bool
) -> None:
    """Whole blocks pass only where no name has to be put right."""
    assert _filter(kind, engine_name=engine_name).may_pass_blocks is is_untouched


def test_names_of_tensorrt_llm() -> None:
    """Each event gets our id and the public name."""
    shown = _filter("tensorrt-llm").feed(TEXT + DONE, is_last=True)
    assert shown == TEXT.replace(b'"x"', b'"chatcmpl-ours"').replace(b'"m"', b'"pub"') + DONE


def test_error_event_is_kept() -> None:
    """What went wrong in the middle is reshaped for the client and told to the relay."""
    events = _filter()
    shown = events.feed(TEXT + ERROR + DONE, is_last=True)
    assert b"secret" not in shown
    assert isinstance(events.error, UpstreamBroken)


@pytest.mark.parametrize(
    ("told", "is_error"),
    [
        (ERROR, True),
        (b'data: { "error": "x"}\n\n', True),
        (b'event: error\ndata: {"type": "error", "error": {}}\n\n', True),
        (event({"id": 1, "error": None}), False),
        (event({"type": "response.created", "response": {"error": None}}), False),
        (event({"choices": [{"text": 'data: {"error": {}}'}]}), False),
        (DONE, False),
    ],
)
def test_error_events(told: bytes, is_error: bool) -> None:
    """Generated text cannot look like one, nor can a field that is null."""
    assert is_error_event(told) is is_error


@given(cuts=st.lists(st.integers(0, 400), max_size=20))
def test_any_split(cuts: list[int]) -> None:
    """However a stream is cut, the same events come out."""
    stream = OWN + TEXT + b": comment\n\n" + TEXT + USAGE + DONE
    events, shown = _filter("sglang", withholds_usage=True), b""
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    for start, end in itertools.pairwise(places):
        shown += events.feed(stream[start:end], is_last=end == len(stream))
    assert shown == TEXT + b": comment\n\n" + TEXT + DONE
    assert events.usage == (7, 3)
    assert not events.is_cut_short(b"")
