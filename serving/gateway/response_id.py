"""The `id` of a response: names our inference id and, where a response is kept, the replica that has it.

Stateless: any worker finds the replica of a stored response from its id alone, also after a restart.
"""

from __future__ import annotations

import re

_PREFIXES = {
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/responses": "resp_",
}
_STORED = re.compile(r"resp_[0-9a-f]{32}([0-9a-f]{3})")


def response_id(path: str, inference_id: bytes, replica_index: int) -> str:
    """The id of a response.

    Args:
        path: The endpoint's.
        inference_id: 32 hexadecimal digits.
        replica_index: Below 1,024.
    """
    name = _PREFIXES.get(path, "") + inference_id.decode()
    return f"{name}{replica_index:03x}" if path == "/v1/responses" else name


def replica_index_of(stored_id: str) -> int | None:
    """Which replica keeps a response, or None if the id is not one of ours."""
    found = _STORED.fullmatch(stored_id)
    return int(found[1], 16) if found else None
