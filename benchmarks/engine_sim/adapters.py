"""The LoRA adapters that a simulated engine knows, with vLLM's answers to loading and unloading.

Source: vllm/entrypoints/openai/models/serving.py. Unloading takes the name away and nothing else:
requests in flight finish.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.engine_sim.errors import SimError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Adapters:
    """Name → path and number.

    Attributes:
        paths: What is loaded, in the order of loading.
    """

    def __init__(self, base_model: str, paths: Mapping[str, str], *, checks_paths: bool) -> None:
        """Starts with some.

        Args:
            base_model: Name that no adapter can have.
            paths: Adapters that are loaded already.
            checks_paths: Whether a path has to exist.
        """
        self._base_model = base_model
        self._checks_paths = checks_paths
        self.paths: dict[str, str] = dict(paths)
        self._ids = {name: number for number, name in enumerate(paths, 1)}
        self._next_id = len(self._ids) + 1

    def id_of(self, name: str) -> int:
        """Number of an adapter: a new one each time that it is loaded."""
        return self._ids[name]

    def load(self, name: str, path: str, *, in_place: bool) -> str:
        """Loads one; what vLLM says to that.

        Raises:
            SimError: In vLLM's words.
        """
        if not name or not path:
            raise _bad_input("Both 'lora_name' and 'lora_path' must be provided.")
        if name == self._base_model:
            raise _bad_input(f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.paths and not in_place:
            raise _bad_input(
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
        if self._checks_paths and not Path(path).exists():
            message = f"Loading lora {name} failed: No adapter found for <path>"
            raise SimError(404, "NotFoundError", message)
        if name not in self.paths:
            self._ids[name] = self._next_id
            self._next_id += 1
        self.paths[name] = path
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> str:
        """Forgets one; what vLLM says to that.

        Raises:
            SimError: In vLLM's words.
        """
        if not name:
            raise _bad_input("'lora_name' needs to be provided to unload a LoRA adapter.")
        if name not in self.paths:
            message = f"The lora adapter '{name}' cannot be found."
            raise SimError(404, "NotFoundError", message)
        del self.paths[name], self._ids[name]
        return f"Success: LoRA adapter '{name}' removed successfully."


def _bad_input(message: str) -> SimError:
    return SimError(400, "InvalidUserInput", message)
