"""What an engine's error body says, cleaned of what is nobody's business outside its machine."""

from __future__ import annotations

import re
from typing import Any

import msgspec

_PATH = re.compile(r"(?<![\w/:.])(?:file://)?(?:/[\w.@+-]+){2,}/?")
_SCHEMA_PARAM = "body."
_SCHEMA_SENTENCE = re.compile(r"'msg': ['\"]([^'\"]+)['\"]")
_SCHEMA_PLACE = re.compile(r"'loc': \('body', '([^']+)'")
_JARGON = re.compile(r"^Value error, |\s*\(parameter=[^()]*\)$")
"""Pydantic's and vLLM's wrapping of a sentence: the field is in `param` already."""
_MAX_MESSAGE_CHARS = 2000


def read_error(body: bytes) -> tuple[str, str | None]:
    """Message and `param` of an error body; paths of the engine's machine are taken out.

    Knows OpenAI's `{"error": {…}}`, `{"error": "…"}`, FastAPI's `{"detail": …}` and the flat
    `{"object": "error", "message": …}` of SGLang and TensorRT-LLM.
    """
    try:
        decoded: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "", None
    error = decoded.get("error", decoded) if isinstance(decoded, dict) else decoded
    if isinstance(error, str):
        place = _SCHEMA_PLACE.search(error)
        return _schema_error(error, place.group(1)) if place else (_redact(error), None)
    if not isinstance(error, dict):
        return "", None
    message = str(error.get("message") or error.get("detail") or "")
    param = error.get("param")
    if isinstance(param, str) and param.startswith(_SCHEMA_PARAM):
        return _schema_error(message, param[len(_SCHEMA_PARAM) :])
    return _redact(message), param if isinstance(param, str) else None


def _schema_error(report: str, name: str) -> tuple[str, str]:
    """Pydantic's report as a Python literal: its sentences are what a client can use."""
    sentences = "; ".join(_SCHEMA_SENTENCE.findall(report)) or "the value is not valid"
    return _redact(f"Invalid '{name}': {sentences}."), name


def _redact(message: str) -> str:
    without_jargon = _JARGON.sub("", message)
    return _PATH.sub("<path>", without_jargon)[:_MAX_MESSAGE_CHARS]
