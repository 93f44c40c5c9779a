"""The events of one stream that need a look: usage, errors, and pieces that are not whole.

The relay's fast path does not come here: it passes blocks of whole events as they are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from serving.engines.base import GENERATION_PATHS
from serving.gateway.answers import error_event
from serving.gateway.sse import DONE_MARK, ERROR_MARK, NO_CHOICES_MARK, USAGE_MARK, EventSplitter
from serving.gateway.usage import Usage, find_usage

if TYPE_CHECKING:
    from serving.engines.base import Dialect, EngineCall
    from serving.errors import ServingError
    from serving.gateway.endpoints import ErrorShape

_ERROR_DATA = re.compile(rb'data: \{\s*"(?:error"|type"\s*:\s*"error")')
"""OpenAI's error event, and Anthropic's; `"error":null` is a field of well responses."""


def is_error_event(event: bytes) -> bool:
    """Whether an event is an error, in OpenAI's or Anthropic's shape."""
    return _ERROR_DATA.search(event) is not None


class EventFilter:
    """Takes a stream's bytes, gives back the events that the client shall see.

    Attributes:
        usage: Token counts, once the engine has sent them.
        error: What the engine said went wrong in the middle of the stream, if it did.
        num_relayed: Events given back by the last `feed`.
    """

    def __init__(
        self,
        *,
        withholds_usage: bool,
        error_shape: ErrorShape,
        request_id: str,
        dialect: Dialect,
        call: EngineCall,
    ) -> None:
        """Starts before the first byte of a stream.

        Args:
            withholds_usage: Whether the usage chunk was our wish and not the client's.
            error_shape: Whose error body the client expects.
            request_id: For error bodies that carry it.
            dialect: Knows the engine's errors and names.
            call: What the stream answers.
        """
        self._splitter = EventSplitter()
        self._withholds_usage = withholds_usage
        self._error_shape = error_shape
        self._request_id = request_id
        self._dialect = dialect
        self._call = call
        self._rewrite = dialect.rewriter(call)
        self._needs_done = dialect.ends_with_done and call.path in GENERATION_PATHS
        self._has_ended = False
        self.usage: Usage | None = None
        self.error: ServingError | None = None
        self.num_relayed = 0

    @property
    def may_pass_blocks(self) -> bool:
        """Whether blocks of whole events may pass untouched from here on."""
        return self._rewrite is None and not self._splitter.rest

    @property
    def rest(self) -> bytes:
        """What has come of an event that is not complete; `feed` passes it on with the last bytes."""
        return self._splitter.rest

    def is_cut_short(self, last_block: bytes) -> bool:
        """Whether the stream ended before the event that should have been its last.

        Args:
            last_block: The last block that passed without coming here.
        """
        return self._needs_done and not self._has_ended and DONE_MARK not in last_block

    def feed(self, body: bytes, *, is_last: bool) -> bytes:
        """Takes the next piece of the stream.

        Args:
            body: Body bytes.
            is_last: Whether the stream ends with them; a last event without its empty line passes.

        Returns:
            What the client shall get now, without framing.

        Raises:
            UpstreamBroken: If an event is too large to hold.
        """
        relayed: list[bytes] = []
        for event in self._splitter.feed(body):
            shown = self._inspect(event)
            if shown:
                relayed.append(shown)
        self.num_relayed = len(relayed)
        if is_last and self.rest:
            self._has_ended = self._has_ended or DONE_MARK in self.rest
            relayed.append(self.rest)
        return b"".join(relayed)

    def _inspect(self, event: bytes) -> bytes:
        """The event as the client shall see it; empty to withhold it."""
        if self._dialect.hides_event(event):
            return b""
        if DONE_MARK in event:
            self._has_ended = True
            return event
        if USAGE_MARK in event:
            self._merge_usage(find_usage(event))
            if self._withholds_usage and NO_CHOICES_MARK in event:
                return b""
        elif ERROR_MARK in event and is_error_event(event):
            # What comes after an error is not looked at: the error is the end.
            self._has_ended = True
            self.error = self._dialect.event_error(event, self._call.public_name)
            return error_event(self.error, self._error_shape, self._request_id)
        return event if self._rewrite is None else self._rewrite(event)

    def _merge_usage(self, found: Usage | None) -> None:
        """Later counts win; Anthropic's last event has only the completion's."""
        if found is None:
            return
        before = self.usage or Usage(0, 0)
        self.usage = Usage(
            found.prompt_tokens or before.prompt_tokens,
            found.completion_tokens or before.completion_tokens,
        )
