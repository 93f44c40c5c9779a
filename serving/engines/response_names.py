"""Ids and model names in an engine's answers, put right without decoding the rest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

_MODEL = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')
_ID = re.compile(rb'"id"\s*:\s*"(?:[^"\\]|\\.)*"')
_CONTENT = b'"choices"'
"""Where what was generated begins: names stand before it, and nothing after it is touched."""


def rename_model(public_name: str) -> Callable[[bytes], bytes]:
    """Returns what puts `public_name` as the `model` of a document or event."""
    field = b'"model":' + msgspec.json.encode(public_name)

    def rewrite(document: bytes) -> bytes:
        return _in_head(document, lambda head: _MODEL.sub(lambda _: field, head, count=1))

    return rewrite


def rename_model_and_id(public_name: str, response_id: str) -> Callable[[bytes], bytes]:
    """Returns what puts both as they shall be, the same in every event of a stream."""
    model_field = b'"model":' + msgspec.json.encode(public_name)
    id_field = b'"id":' + msgspec.json.encode(response_id)

    def rename(head: bytes) -> bytes:
        renamed = _MODEL.sub(lambda _: model_field, head, count=1)
        return _ID.sub(lambda _: id_field, renamed, count=1)

    return lambda document: _in_head(document, rename)


def _in_head(document: bytes, rename: Callable[[bytes], bytes]) -> bytes:
    head, mark, rest = document.partition(_CONTENT)
    return rename(head) + mark + rest
