"""vLLM's adapters (0.32, `vllm/entrypoints/openai/models/serving.py`).

`load_inplace` is never used: the engine would read the adapter from disk at each step, and its prefix
cache is keyed by name and path. Unloading takes the name away and nothing else: requests in flight
finish, and may make the engine read the folder again, which must be there or the engine dies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.engines.lora import LoraEngine, LoraFailure, LoraTarget, said, tell

if TYPE_CHECKING:
    from serving.config import EngineKind

_NO_ROUTES = (
    "The engine has no routes for adapters: start it with --enable-lora and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
)


class VllmLora(LoraEngine):
    """Loads by `/v1/load_lora_adapter`; a version is listed as `parent`'s adapter."""

    kind: EngineKind = "vllm"

    async def load(self, target: LoraTarget, version: str, path: str) -> None:
        """Load; a duplicate is success where the list has it under the same path."""
        fields = {"lora_name": version, "lora_path": path}
        got = await tell(target, "/v1/load_lora_adapter", fields, self.load_s)
        if got.status == 200:
            return
        message = said(got.body)
        if got.status == 404 and message == "Not Found":
            raise LoraFailure(_NO_ROUTES, is_terminal=True)
        if got.status == 400 and "already been loaded" in message:
            await self._check_listed(target, version, path)
            return
        # A rank above the engine's, DoRA and other refusals come as 500: what they say is kept.
        raise LoraFailure(f"The engine answered {got.status}: {message}")

    async def unload(self, target: LoraTarget, version: str) -> None:
        """Unload; 404 for the adapter is success."""
        fields = {"lora_name": version}
        got = await tell(target, "/v1/unload_lora_adapter", fields, self.unload_s)
        message = said(got.body)
        if got.status == 404 and message == "Not Found":
            raise LoraFailure(_NO_ROUTES, is_terminal=True)
        if got.status not in (200, 404):
            raise LoraFailure(f"The engine answered {got.status}: {message}", may_have=True)

    async def _check_listed(self, target: LoraTarget, version: str, path: str) -> None:
        try:
            listing = await self.listing(target)
        except OSError as error:
            raise LoraFailure(f"The engine does not list: {error}.", may_have=True) from error
        listed = (listing.adapters or {}).get(version)
        if listed != path:
            raise LoraFailure(
                "The engine has the version from another folder than this one.", may_have=True
            )
