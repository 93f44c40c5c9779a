"""Dialects of the engines, one file each, and how their processes are started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.engines.sglang import Sglang
from serving.engines.tensorrt_llm import TensorrtLlm
from serving.engines.vllm import Vllm

if TYPE_CHECKING:
    from serving.config import EngineKind
    from serving.engines.base import Dialect

__all__ = ["dialect_of"]

_DIALECTS: dict[EngineKind, Dialect] = {
    "vllm": Vllm(),
    "sglang": Sglang(),
    "tensorrt-llm": TensorrtLlm(),
}


def dialect_of(kind: EngineKind) -> Dialect:
    """The dialect that an engine speaks."""
    return _DIALECTS[kind]
