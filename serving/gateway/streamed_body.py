"""A request body that is relayed while it comes: held until it can flow, and paused where it cannot.

Owns the bytes that are held and the flow control between both connections. Never looks into them:
`form_body.py` does. Fed by `request_reader.py`; made to flow by `form_exchange.py` and
`control_relay.py`.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Protocol

from serving.gateway.sse import LAST_CHUNK, chunk

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.errors import ServingError
    from serving.gateway.upstream import UpstreamConnection

_REPLAY_BYTES = 256 * 1024
"""Kept of what has been sent, for a second attempt; a body that grows beyond it has one attempt."""


class BodyRelayer(Protocol):
    """Who relays a body."""

    def body_failed(self, error: ServingError) -> None:
        """The client will not send the rest, or it cannot be relayed."""


class StreamedBody:
    """One body on its way from a client to a replica or the control plane.

    Attributes:
        length_bytes: What the client says that it sends, or None where it sends chunks.
        max_bytes: A longer body is refused.
        is_complete: Whether all of it has come.
        is_replayable: Whether all that has come is still held, so that it can be sent again.
        num_held_bytes: What is held now.
        ended_at: `time.monotonic()` of its end.
        stalled_since: When whoever reads it stopped reading, or None.
        relayer: Who relays it, once it is its turn.
    """

    __slots__ = (
        "_connection",
        "_held",
        "_hold_client",
        "_is_closed",
        "_max_held_bytes",
        "ended_at",
        "is_complete",
        "is_replayable",
        "length_bytes",
        "max_bytes",
        "num_held_bytes",
        "relayer",
        "stalled_since",
    )

    def __init__(
        self,
        hold_client: Callable[[bool], None],
        length_bytes: int | None,
        max_bytes: int,
        max_held_bytes: int,
    ) -> None:
        """Begins before the first byte.

        Args:
            hold_client: Stops reading from the client, or goes on.
            length_bytes: From the head; None for chunks.
            max_bytes: Of the whole.
            max_held_bytes: The client is not read on with more than this held and not flowing.
        """
        self._hold_client = hold_client
        self.length_bytes = length_bytes
        self.max_bytes = max_bytes
        self._max_held_bytes = max_held_bytes
        self._held: list[bytes] = []
        self.num_held_bytes = 0
        self.is_complete = False
        self.is_replayable = True
        self.ended_at = 0.0
        self.stalled_since: float | None = None
        self.relayer: BodyRelayer | None = None
        self._connection: UpstreamConnection | None = None
        self._is_closed = False

    @property
    def is_decided(self) -> bool:
        """Whether enough has come to know where it goes."""
        return True

    # What the reader calls.

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes from the client.

        Raises:
            ServingError: If the body cannot be what it should be.
        """
        if self._is_closed:
            return
        connection = self._connection
        if connection is None:
            self._keep(piece)
            if self.is_decided and self.num_held_bytes > self._max_held_bytes:
                self._hold_client(True)
            return
        if self.is_replayable and self.num_held_bytes + len(piece) <= _REPLAY_BYTES:
            self._keep(piece)
        else:
            self.forget()
        if not connection.transport.is_closing():
            connection.transport.write(chunk(piece) if self.length_bytes is None else piece)

    def _keep(self, piece: bytes) -> None:
        self._held.append(piece)
        self.num_held_bytes += len(piece)

    def end(self) -> None:
        """All of it has come.

        Raises:
            ServingError: If it cannot be what it should be.
        """
        self.is_complete = True
        self.ended_at = monotonic()
        connection = self._connection
        if connection is not None and self.length_bytes is None:
            connection.transport.write(LAST_CHUNK)

    def fail(self, error: ServingError) -> None:
        """The rest will not come: tells whoever relays it."""
        if self.relayer is not None:
            self.relayer.body_failed(error)

    # What the relayer calls.

    def held(self) -> bytes:
        """What is held, joined once."""
        if len(self._held) != 1:
            self._held = [b"".join(self._held)]
        return self._held[0]

    def framed(self, first: bytes) -> bytes:
        """What is held, as it goes out; `first` are its bytes."""
        if self.length_bytes is not None:
            return first
        return (chunk(first) if first else b"") + (LAST_CHUNK if self.is_complete else b"")

    def flow_to(self, connection: UpstreamConnection) -> None:
        """What is held has been sent on this connection; all that comes follows it."""
        self._connection = connection
        connection.body = self
        if connection.is_write_paused:
            self.hold()
        else:
            self._hold_client(False)

    def forget(self) -> None:
        """Nothing will be sent again."""
        self.is_replayable = False
        self._held.clear()
        self.num_held_bytes = 0

    def detach(self) -> None:
        """The connection is lost; what comes is held again."""
        self._connection = None
        self.go_on()

    def close(self) -> None:
        """The request has been answered; what still comes is dropped."""
        self._is_closed = True
        self.relayer = None
        self.forget()
        self.detach()

    # What the connection calls.

    def hold(self) -> None:
        """Whoever reads is slower than the client."""
        if self.stalled_since is None:
            self.stalled_since = monotonic()
        if not self.is_complete:
            self._hold_client(True)

    def go_on(self) -> None:
        """It has caught up."""
        self.stalled_since = None
        self._hold_client(False)

    # Deadlines.

    def is_stalled(self, now: float, bound_s: float) -> bool:
        """Whether nothing of the body has been taken for so long."""
        return self.stalled_since is not None and now - self.stalled_since > bound_s

    def is_overdue(self, now: float, sent_at: float, bound_s: float) -> bool:
        """Whether an answer should have begun by now.

        Args:
            now: `time.monotonic()`.
            sent_at: When the head was sent.
            bound_s: For the first byte, from the end of the body.
        """
        return self.is_complete and now - max(sent_at, self.ended_at) > bound_s
