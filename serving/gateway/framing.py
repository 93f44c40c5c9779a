"""Where a chunked request body begins and ends, beyond what the parser itself refuses.

llhttp refuses both lengths at once, repeated or odd ones, `chunked` that is not last, bad sizes and
bare line ends. What it lets pass is judged here: other codings before `chunked`, and framing without
end. Used by `client.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import MalformedHttp

if TYPE_CHECKING:
    from collections.abc import Iterable

CHUNKED = b"chunked"
_TRANSFER_ENCODING = b"transfer-encoding"
_MAX_OVERHEAD_BYTES = 128 * 1024
"""More than a head, which comes in the same blocks."""
_OVERHEAD_BYTES_PER_BYTE = 16
"""A body may come in chunks of one byte, six bytes each on the wire, but not in mere framing
(in Go that was CVE-2023-39326)."""
NOT_CHUNKED = -1


def transfer_coding(raw_headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The coding of a body whose head has one: `chunked`, or what is to be refused.

    Args:
        raw_headers: As sent: names that differ in case only are two.
    """
    codings = [value for name, value in raw_headers if name.lower() == _TRANSFER_ENCODING]
    others = [value for value in codings if value.strip().lower() != CHUNKED]
    return others[0] if others else CHUNKED


def check_overhead(wire_bytes: int, body_bytes: int) -> None:
    """Bounds extensions and zeros before a chunk's size, which HTTP does not.

    Args:
        wire_bytes: Received since the head, or with it.
        body_bytes: Of the body in that.

    Raises:
        MalformedHttp: If there is too much around too little.
    """
    if wire_bytes > _MAX_OVERHEAD_BYTES + _OVERHEAD_BYTES_PER_BYTE * body_bytes:
        raise MalformedHttp("The chunks of the request have too much around them.")
