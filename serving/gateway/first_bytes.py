"""What becomes of a response, judged by its head and first bytes while a retry is still possible.

Pure; called by `exchange.py` until something has gone to the client.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

from serving.engines.base import GENERATION_PATHS
from serving.errors import AdapterMissing, UpstreamBroken
from serving.gateway.events import is_error_event
from serving.gateway.sse import ERROR_MARK

if TYPE_CHECKING:
    from serving.engines.base import Dialect, EngineCall
    from serving.errors import ServingError
    from serving.gateway.upstream import UpstreamConnection

_MAX_ERROR_BODY_BYTES = 65_536
_MAX_HELD_BYTES = 1024 * 1024
_MAX_REWRITTEN_BYTES = 64 * 1024 * 1024
_EVENT_STREAM = b"text/event-stream"

_ABORT_MARK = b'"finish_reason":"abort"'
_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content|arguments)":"[^"]')
_ROLE_MARK = b'"role":"assistant"'


def is_decided(first: bytes) -> bool:
    """Whether a stream's first events tell if it has begun well: one that is more than the role.

    Engines send the role together with what they generated first, so that waiting for that costs
    nothing; where they gave up instead, the abort or the error is the second event.
    """
    return first.count(b"\n\n") > first.count(_ROLE_MARK) or (
        b"\n\n" in first and _TEXT.search(first) is not None
    )


def early_failure(dialect: Dialect, first: bytes, model: str) -> ServingError | None:
    """What the first bytes of a 200 say went wrong, or None.

    SGLang streams the error of a full queue under a 200; vLLM and SGLang answer an aborted or
    paused request with 200 and `finish_reason: abort`.

    Args:
        dialect: Of the engine.
        first: The whole body, or a stream's first events.
        model: Public name of the model.
    """
    has_error, has_abort = ERROR_MARK in first, _ABORT_MARK in first
    if not (has_error or has_abort) or _TEXT.search(first):
        # Where an error comes later, it is that of a stream that had begun.
        return None
    if has_error:
        for event in first.split(b"\n\n"):
            if is_error_event(event):
                return dialect.event_error(event, model)
    if has_abort:
        return UpstreamBroken("The engine gave the request up before it had generated anything.")
    return None


class Verdict(NamedTuple):
    """What to do now.

    Attributes:
        kind: How to relay the response, or that the attempt has failed.
        first: What has come of the body, as the client shall see it.
        error: Why it failed.
    """

    kind: Literal["stream", "body", "failed"]
    first: bytes = b""
    error: ServingError | None = None


def judge(
    upstream: UpstreamConnection, held: bytes, call: EngineCall, model: str
) -> Verdict | None:
    """Judges a response by what has come of it.

    An error is held until it is whole, since it never passes as it is; a stream until it has said
    more than its role; and a body of moderate size, or one that has to be rewritten, until its end: up
    to there an engine that fails is a failure before the first byte.

    Args:
        upstream: Has the response's head.
        held: The body so far.
        call: What it answers.
        model: Public name of the model, for errors.

    Returns:
        None to wait for more.
    """
    dialect = upstream.replica.dialect
    if upstream.status >= 300:
        if not upstream.is_complete and len(held) < _MAX_ERROR_BODY_BYTES:
            return None
        if call.adapter is not None and dialect.lacks_adapter(upstream.status, held):
            return Verdict("failed", error=AdapterMissing(f"The replica does not have '{model}'."))
        return Verdict("failed", error=dialect.to_error(upstream.status, held, model))
    if upstream.headers.get(b"content-type", b"").startswith(_EVENT_STREAM):
        if not (upstream.is_complete or is_decided(held) or len(held) > _MAX_HELD_BYTES):
            return None
        verdict = Verdict("stream", held)
    else:
        body = _whole_body(upstream, held, call)
        if body is None:
            return None
        verdict = body
    failure = early_failure(dialect, held, model)
    return verdict if failure is None else Verdict("failed", error=failure)


def _whole_body(upstream: UpstreamConnection, held: bytes, call: EngineCall) -> Verdict | None:
    rewrite = upstream.replica.dialect.rewriter(call)
    if rewrite is not None:
        if len(held) > _MAX_REWRITTEN_BYTES:
            return Verdict(
                "failed", error=UpstreamBroken("The engine's response is too large to relay.")
            )
        return Verdict("body", rewrite(held)) if upstream.is_complete else None
    if call.path in GENERATION_PATHS and not upstream.is_complete and len(held) <= _MAX_HELD_BYTES:
        return None
    return Verdict("body", held)
