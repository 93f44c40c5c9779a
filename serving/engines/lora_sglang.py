"""SGLang's adapters (0.5.23, `srt/managers/tokenizer_control_mixin.py`, `srt/lora/lora_registry.py`).

An unload waits in the engine until the requests that use the adapter have ended, and holds up loads
meanwhile. It does not revoke: a later request that names the adapter loads it again without a word,
from the folder of the first load. So gateways must no longer route to it before it is unloaded, and the
folder stays until then.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from serving.engines.lora import (
    LIST_S,
    Listing,
    LoraEngine,
    LoraFailure,
    LoraTarget,
    ask,
    said,
    tell,
)

if TYPE_CHECKING:
    from serving.config import EngineKind
    from serving.fleet.http_client import Got


class SglangLora(LoraEngine):
    """Loads by `/load_lora_adapter`; requests name `base:adapter`."""

    kind: EngineKind = "sglang"
    unload_s = 600.0

    async def listing(self, target: LoraTarget) -> Listing:
        """Ask for the list, and for the bounds that it was started with."""
        listing = await super().listing(target)
        with suppress(OSError, ValueError, KeyError, TypeError):
            info: Any = msgspec.json.decode((await ask(target, "/server_info", LIST_S)).body)
            per_batch = int(info["max_loras_per_batch"])
            loaded = info.get("max_loaded_loras")
            # Its batches count the base model as an adapter.
            return listing._replace(
                max_registered=None if loaded is None else int(loaded), gpu_slots=per_batch - 1
            )
        return listing

    async def load(self, target: LoraTarget, version: str, path: str) -> None:
        """Load, never pinned: pinned adapters take slots of a batch for good."""
        fields = {"lora_name": version, "lora_path": path, "pinned": False}
        got = await tell(target, "/load_lora_adapter", fields, self.load_s)
        if _is_done(got) or _loaded(got).get(version) == path:
            return
        raise _failure(got, "load")

    async def unload(self, target: LoraTarget, version: str) -> None:
        """Unload; returns when no request uses the adapter any more."""
        got = await tell(target, "/unload_lora_adapter", {"lora_name": version}, self.unload_s)
        if _is_done(got) or "does not exist" in said(got.body):
            return
        raise _failure(got, "unload", may_have=True)


def _is_done(got: Got) -> bool:
    return got.status == 200 and _answer(got).get("success", True) is True


def _answer(got: Got) -> dict[str, Any]:
    try:
        told = msgspec.json.decode(got.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return told if isinstance(told, dict) else {}


def _loaded(got: Got) -> dict[str, Any]:
    loaded = _answer(got).get("loaded_adapters")
    return loaded if isinstance(loaded, dict) else {}


def _failure(got: Got, what: str, *, may_have: bool = False) -> LoraFailure:
    message = said(got.body)
    if got.status == 404:
        return LoraFailure("The engine has no routes for adapters.", is_terminal=True)
    if got.status == 500 and not _answer(got):
        return LoraFailure(
            f"The engine failed at the {what} without saying why, as it does when its dp_size is above "
            "1: adapters that are loaded while it runs need dp_size 1.",
            is_terminal=True,
        )
    is_off = "--enable-lora" in message
    return LoraFailure(
        f"The engine answered {got.status}: {message}", is_terminal=is_off, may_have=may_have
    )
