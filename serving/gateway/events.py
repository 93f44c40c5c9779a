"""The events of one stream that need a look: usage, errors, and pieces that are not whole.

The relay's fast path does not come here: it passes blocks of whole events as they are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from serving.gateway.answers import error_event
from serving.gateway.sse import ERROR_MARK, NO_CHOICES_MARK, USAGE_MARK, EventSplitter
from serving.gateway.usage import Usage, find_usage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serving.engines.base import Dialect
    from serving.gateway.endpoints import ErrorShape

_DATA = b"data: "
_ERROR_DATA = re.compile(rb'data: \{\s*"(?:error"|type"\s*:\s*"error")')
"""OpenAI's error event, and Anthropic's; `"error":null` is a field of well responses."""


class EventFilter:
    """Takes a stream's bytes, gives back the events that the client shall see.

    Attributes:
        usage: Token counts, once the engine has sent them.
        num_relayed: Events given back by the last `feed`.
    """

    def __init__(
        self,
        *,
        withholds_usage: bool,
        error_shape: ErrorShape,
        request_id: str,
        dialect: Dialect,
        model: str,
    ) -> None:
        """Starts before the first byte of a stream.

        Args:
            withholds_usage: Whether the usage chunk was our wish and not the client's.
            error_shape: Whose error body the client expects.
            request_id: For error bodies that carry it.
            dialect: Reads the engine's own errors.
            model: Public name, for their text.
        """
        self._splitter = EventSplitter()
        self._withholds_usage = withholds_usage
        self._error_shape = error_shape
        self._request_id = request_id
        self._dialect = dialect
        self._model = model
        self.usage: Usage | None = None
        self.num_relayed = 0

    @property
    def is_between_events(self) -> bool:
        """Whether all bytes so far were whole events, so that the next byte begins one."""
        return not self._splitter.rest

    def feed(self, parts: Iterable[bytes], *, is_last: bool) -> bytes:
        """Takes the next pieces of the stream.

        Args:
            parts: Body bytes, in order.
            is_last: Whether the stream ends with them; a last event without its empty line passes.

        Returns:
            What the client shall get now, without framing.

        Raises:
            UpstreamBroken: If an event is too large to hold.
        """
        relayed: list[bytes] = []
        for event in self._splitter.feed(b"".join(parts)):
            shown = self._inspect(event)
            if shown:
                relayed.append(shown)
        self.num_relayed = len(relayed)
        if is_last and self._splitter.rest:
            relayed.append(self._splitter.rest)
        return b"".join(relayed)

    def _inspect(self, event: bytes) -> bytes:
        """The event as the client shall see it; empty to withhold it."""
        if USAGE_MARK in event:
            self._merge_usage(find_usage(event))
            if self._withholds_usage and NO_CHOICES_MARK in event:
                return b""
        elif ERROR_MARK in event and _ERROR_DATA.search(event):
            _, _, data = event.partition(_DATA)
            error = self._dialect.to_error(500, data.strip(), self._model)
            return error_event(error, self._error_shape, self._request_id)
        return event

    def _merge_usage(self, found: Usage | None) -> None:
        """Later counts win; Anthropic's last event has only the completion's."""
        if found is None:
            return
        before = self.usage or Usage(0, 0)
        self.usage = Usage(
            found.prompt_tokens or before.prompt_tokens,
            found.completion_tokens or before.completion_tokens,
        )
