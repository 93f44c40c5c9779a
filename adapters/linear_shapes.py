"""Which linear modules a base model has, and of which sizes, by its config.json.

Owns the layouts of the architectures that we know for sure (module names as in transformers). Never reads weights; of an
architecture that it does not know it says nothing. Called by the linter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_LAYERS = 1000
MAX_EXPERTS = 4096
MAX_FEATURES = 2**30

Size = tuple[int, int]
"""(in_features, out_features)."""

_SPLIT = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite", "olmo2"),
    *("gemma", "gemma2", "gemma3_text"),
)


class _Unknown(Exception):
    """The config lacks a size, or gives an impossible one."""


@dataclass(frozen=True)
class LinearShapes:
    """The linear modules and embeddings of one base model."""

    num_layers: int
    vocab_rows: int
    _per_layer: tuple[Mapping[str, Size], ...] = field(repr=False)
    _outside: Mapping[str, Size] = field(repr=False)

    def size_of(self, path: str) -> Size | None:
        """Return (in_features, out_features) of a module, None if the model has no such linear.

        Args:
            path: As in `model.layers.0.self_attn.q_proj`.
        """
        parts = path.split(".", 3)
        if len(parts) < 4 or parts[:2] != ["model", "layers"]:
            return self._outside.get(path)
        number = parts[2]
        is_layer = number.isascii() and number.isdigit() and str(int(number[:9])) == number
        if not is_layer or int(number) >= self.num_layers:
            return None
        return self._per_layer[int(number)].get(parts[3])

    def num_modules(self, name: str) -> int:
        """Count the modules whose name ends in `name`."""
        return self._counts[name]

    @cached_property
    def _counts(self) -> Counter[str]:
        every = chain(self._outside, *self._per_layer)
        return Counter(path.rpartition(".")[2] for path in every)


def linear_shapes(config: Mapping[str, Any]) -> LinearShapes | None:
    """Return the modules of a base model, None if its architecture or a size is not known.

    Args:
        config: Its config.json.
    """
    layout = _LAYOUTS.get(str(config.get("model_type")))
    if layout is None:
        return None
    try:
        num_layers = _size(config, "num_hidden_layers", MAX_LAYERS)
        hidden, vocab = _size(config, "hidden_size"), _size(config, "vocab_size")
        layers = tuple(layout(config, layer) for layer in range(num_layers))
    except _Unknown:
        return None
    outside = {"model.embed_tokens": (vocab, hidden), "lm_head": (hidden, vocab)}
    return LinearShapes(num_layers, vocab, layers, outside)


def _size(
    config: Mapping[str, Any], name: str, most: int = MAX_FEATURES, default: int | None = None
) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= most:
        raise _Unknown(name)
    return value


def _attention(config: Mapping[str, Any]) -> dict[str, Size]:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head = _size(config, "head_dim", default=hidden // heads)
    kv = head * _size(config, "num_key_value_heads", default=heads)
    return {
        "self_attn.q_proj": (hidden, heads * head),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (heads * head, hidden),
    }


def _gated(prefix: str, hidden: int, inner: int) -> dict[str, Size]:
    return {
        f"{prefix}.gate_proj": (hidden, inner),
        f"{prefix}.up_proj": (hidden, inner),
        f"{prefix}.down_proj": (inner, hidden),
    }


def _split(config: Mapping[str, Any], _layer: int) -> dict[str, Size]:
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    return _attention(config) | _gated("mlp", hidden, inner)


def _phi3(config: Mapping[str, Any], _layer: int) -> dict[str, Size]:
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    attention = _attention(config)
    q_out, kv_out = attention["self_attn.q_proj"][1], attention["self_attn.k_proj"][1]
    return {
        "self_attn.qkv_proj": (hidden, q_out + 2 * kv_out),
        "self_attn.o_proj": attention["self_attn.o_proj"],
        "mlp.gate_up_proj": (hidden, 2 * inner),
        "mlp.down_proj": (inner, hidden),
    }


def _mixtral(config: Mapping[str, Any], _layer: int) -> dict[str, Size]:
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    num_experts = _size(config, "num_local_experts", MAX_EXPERTS)
    modules = _attention(config) | {"block_sparse_moe.gate": (hidden, num_experts)}
    for expert in range(num_experts):
        prefix = f"block_sparse_moe.experts.{expert}"
        modules |= {f"{prefix}.w1": (hidden, inner), f"{prefix}.w3": (hidden, inner)}
        modules[f"{prefix}.w2"] = (inner, hidden)
    return modules


def _qwen_moe(config: Mapping[str, Any], layer: int) -> dict[str, Size]:
    dense = config.get("mlp_only_layers")
    step = _size(config, "decoder_sparse_step", default=1)
    if (isinstance(dense, list) and layer in dense) or (layer + 1) % step:
        return _split(config, layer)
    hidden, inner = _size(config, "hidden_size"), _size(config, "moe_intermediate_size")
    num_experts = _size(config, "num_experts", MAX_EXPERTS)
    modules = _attention(config) | {"mlp.gate": (hidden, num_experts)}
    for expert in range(num_experts):
        modules |= _gated(f"mlp.experts.{expert}", hidden, inner)
    if config.get("model_type") == "qwen2_moe":
        shared = _size(config, "shared_expert_intermediate_size")
        modules |= _gated("mlp.shared_expert", hidden, shared)
        modules["mlp.shared_expert_gate"] = (hidden, 1)
    return modules


_LAYOUTS: dict[str, Callable[[Mapping[str, Any], int], dict[str, Size]]] = {
    **dict.fromkeys(_SPLIT, _split),
    "phi3": _phi3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
}
