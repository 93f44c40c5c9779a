"""The tensors of an adapter by what they are: A and B of each module, magnitudes, and what is no LoRA at all.

Owns the grammar of the names that PEFT saves. Never reads values, never judges. Called by the linter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapters.safetensors_header import TensorEntry

PREFIX = "base_model.model."
EMBEDDINGS = frozenset({"embed_tokens", "lm_head"})
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)\.weight", re.DOTALL)
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>A|B)", re.DOTALL)
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?", re.DOTALL)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


class ExtraKind(StrEnum):
    """What a tensor is that belongs to no LoRA."""

    BASE_EMBEDDING = "base embedding"
    """A copy of the base model's embedding rows, saved beside a LoRA of it."""
    LORA_BIAS = "LoRA bias"
    TOKEN_DELTA = "trained token rows"  # noqa: S105
    WEIGHT = "whole weight"
    """A whole weight or bias of a module: `modules_to_save`, `bias`, resized embeddings."""
    OTHER = "unknown"


@dataclass
class LoraModule:
    """The LoRA of one module."""

    path: str
    """In the base model, as in `model.layers.0.self_attn.q_proj`."""
    is_embedding: bool = False
    a: TensorEntry | None = None
    b: TensorEntry | None = None
    magnitude: TensorEntry | None = None

    @property
    def name(self) -> str:
        """Last part of its path."""
        return self.path.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """Number of its layer, None outside of the layers."""
        return layer_of(self.path)

    @property
    def rank(self) -> int | None:
        """Rank by the shapes of A or B."""
        if self.a is not None and self.a.shape:
            return self.a.shape[0]
        return self.b.shape[-1] if self.b is not None and self.b.shape else None


@dataclass(frozen=True)
class LoraTensors:
    """All tensors of an adapter."""

    modules: Mapping[str, LoraModule]
    extras: Mapping[str, ExtraKind]
    """By the tensor's full name."""
    unprefixed: tuple[str, ...] = field(default=())
    """Names of LoRA tensors without PEFT's `base_model.model.`."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Last parts of the modules' names, sorted, each once."""
        return tuple(sorted({module.name for module in self.modules.values()}))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that occur, ascending."""
        return tuple(sorted({m.rank for m in self.modules.values() if m.rank is not None}))

    def extras_of(self, *kinds: ExtraKind) -> tuple[str, ...]:
        """Return the names of the tensors of some kinds."""
        return tuple(name for name, kind in self.extras.items() if kind in kinds)


def layer_of(name: str) -> int | None:
    """Return the number of the layer in a tensor's or module's name."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def sort_tensors(tensors: Mapping[str, TensorEntry]) -> LoraTensors:
    """Sort the tensors of a header by what they are."""
    modules: dict[str, LoraModule] = {}
    extras: dict[str, ExtraKind] = {}
    unprefixed = []
    for name, entry in tensors.items():
        found = _LORA.fullmatch(name) or _EMBEDDING.fullmatch(name) or _MAGNITUDE.fullmatch(name)
        if found is None:
            extras[name] = _extra_kind(name)
            continue
        if not name.startswith(PREFIX):
            unprefixed.append(name)
        path = found["module"].removeprefix(PREFIX)
        module = modules.setdefault(path, LoraModule(path))
        _place(module, found, entry)
    return LoraTensors(modules, extras, tuple(unprefixed))


def _place(module: LoraModule, found: re.Match[str], entry: TensorEntry) -> None:
    part = found.groupdict().get("part")
    if part is None:
        module.magnitude = entry
        return
    module.is_embedding = module.is_embedding or found.re is _EMBEDDING
    if part == "A":
        module.a = entry
    else:
        module.b = entry


def _extra_kind(name: str) -> ExtraKind:
    if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
        return ExtraKind.BASE_EMBEDDING
    if name.endswith((".lora_A.bias", ".lora_B.bias")):
        return ExtraKind.LORA_BIAS
    if name.endswith(".trainable_tokens_delta"):
        return ExtraKind.TOKEN_DELTA
    if name.endswith((".weight", ".bias")) and "lora_" not in name:
        return ExtraKind.WEIGHT
    return ExtraKind.OTHER
