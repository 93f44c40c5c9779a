"""TensorRT-LLM's adapters: they come with each request, so that there is nothing to load or to list.

The engine reads the folder when a request first names the version's number (`lora_int_id`), and its
cache is keyed by that number alone: a number is never given to another version. What can go wrong
shows in the probe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.engines.lora import Listing, LoraEngine, LoraTarget

if TYPE_CHECKING:
    from serving.config import EngineKind


class TensorrtLlmLora(LoraEngine):
    """Makes nothing of loads and unloads."""

    kind: EngineKind = "tensorrt-llm"

    async def listing(self, target: LoraTarget) -> Listing:
        """Ask for the base model; adapters are never listed."""
        return (await super().listing(target))._replace(adapters=None)

    async def load(self, target: LoraTarget, version: str, path: str) -> None:
        """Nothing: the first request loads it."""

    async def unload(self, target: LoraTarget, version: str) -> None:
        """Nothing: what no request names leaves the cache as others come."""
