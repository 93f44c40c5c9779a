"""The adapters of a simulated SGLang, with what its registry does wrong.

Sources: sglang/srt/lora/lora_registry.py, managers/tokenizer_control_mixin.py (0.5.23).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from adapter_weights import contents_of


class LoraRefused(Exception):
    """The registry says no; the text is SGLang's."""


@dataclass(eq=False)
class LoadedLora:
    """One adapter that is loaded, or is being unloaded.

    Attributes:
        contents: What was in its files when they were read.
    """

    name: str
    path: str
    is_pinned: bool = False
    num_users: int = 0
    contents: str = ""
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self) -> None:
        """One more request uses it."""
        self.num_users += 1
        self.unused.clear()

    def give_back(self) -> None:
        """A request has ended."""
        self.num_users -= 1
        if self.num_users == 0:
            self.unused.set()


class SglangLoras:
    """Name → adapter, and the cache of references that is never pruned.

    Attributes:
        loaded: What requests find.
        num_evicted: Adapters that a load has pushed out, as there were `max_loaded` already.
        ever_loaded: Paths of all that were ever loaded: unloading does not revoke, the next request
            that names one loads it again.
    """

    def __init__(
        self,
        paths: dict[str, str],
        *,
        is_enabled: bool,
        max_per_batch: int,
        max_loaded: int | None = None,
        checks_paths: bool = False,
    ) -> None:
        self.is_enabled = is_enabled
        self.max_per_batch = max_per_batch
        self.max_loaded = max_loaded
        self.checks_paths = checks_paths
        self.num_evicted = 0
        self.loaded: dict[str, LoadedLora] = {}
        self.ever_loaded: dict[str, str] = {}
        for name, path in paths.items():
            self._add(LoadedLora(name, path))

    def load(self, name: str, path: str, *, is_pinned: bool) -> None:
        """Loads an adapter; there is no loading in place."""
        if not self.is_enabled:
            raise LoraRefused("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
        if name in self.loaded:
            raise LoraRefused(
                f"Failed to load LoRA adapter '{name}' because it is already loaded. "
                f"Loaded LoRA adapters: {list(self.loaded)}"
            )
        num_pinned = sum(one.is_pinned for one in self.loaded.values())
        if is_pinned and num_pinned >= self.max_per_batch - 1:
            raise LoraRefused(
                f"Failed to load LoRA adapter '{name}' as a pinned adapter: it would leave no slot "
                "for unpinned adapters and the base model."
            )
        self._add(LoadedLora(name, path, is_pinned))

    def begin_unload(self, name: str) -> LoadedLora:
        """Takes the name away; the caller has to wait until nobody uses the adapter."""
        if name not in self.loaded:
            raise LoraRefused(
                f"LoRA with name {name} does not exist. Loaded LoRAs: {list(self.loaded)}"
            )
        lora = self.loaded.pop(name)
        if lora.num_users == 0:
            lora.unused.set()
        return lora

    def find(self, name: str) -> LoadedLora:
        """The adapter for a request; one that was unloaded is silently loaded again."""
        if not self.is_enabled:
            raise LoraRefused(
                f"LoRA adapter '{name}' was requested, but LoRA is not enabled. Please launch the "
                "server with --enable-lora flag and preload adapters using --lora-paths or "
                "/load_lora_adapter endpoint."
            )
        if name not in self.loaded and name in self.ever_loaded:
            self._add(LoadedLora(name, self.ever_loaded[name]))
        if name not in self.loaded:
            raise LoraRefused(
                f"The following requested LoRA adapters are not loaded: {name}\n"
                f"Loaded adapters: {self.loaded.keys()}."
            )
        return self.loaded[name]

    def paths(self) -> dict[str, str]:
        """Name → path, as the load and unload routes answer."""
        return {name: lora.path for name, lora in self.loaded.items()}

    def restart(self) -> None:
        """Forgets everything, as a new process does."""
        self.loaded.clear()
        self.ever_loaded.clear()

    def _add(self, lora: LoadedLora) -> None:
        if self.checks_paths and not Path(lora.path).is_dir():
            raise LoraRefused(f"Failed to load LoRA adapter '{lora.name}': no {lora.path}")
        if self.max_loaded is not None and len(self.loaded) >= self.max_loaded:
            # Habit: one that is not pinned makes room, and nobody is told (`lru_lora_name`).
            evicted = next(one.name for one in self.loaded.values() if not one.is_pinned)
            del self.loaded[evicted]
            self.num_evicted += 1
        lora.contents = contents_of(lora.path)
        self.loaded[lora.name] = lora
        self.ever_loaded[lora.name] = lora.path
