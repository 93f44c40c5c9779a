"""Writes adapters as PEFT saves them, and the base model that they are for, into folders of a test."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def make_base(folder: Path, **config: Any) -> Path:
    """Write the folder of a tiny Llama: its config.json and one safetensors file; `config` changes fields."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**LLAMA, **config}
    (folder / "config.json").write_text(json.dumps(fields))
    rows = np.zeros((int(fields["vocab_size"]), int(fields["hidden_size"])), np.float16)
    save_file({"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    return folder


def sizes(module: str, hidden: int, kv: int, intermediate: int) -> tuple[int, int]:
    """Return (in, out) features of a Llama's linear module."""
    return {
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }.get(module, (hidden, hidden))


def lora_tensors(
    *,
    rank: int = 8,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    num_layers: int = 2,
    hidden: int = 64,
    kv: int = 32,
    intermediate: int = 128,
    dtype: Any = np.float32,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return a LoRA's tensors under the names that PEFT gives them; A and B are both random."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(num_layers):
        for module in target_modules:
            block = "mlp" if module in {"gate_proj", "up_proj", "down_proj"} else "self_attn"
            path = f"base_model.model.model.layers.{layer}.{block}.{module}"
            num_in, num_out = sizes(module, hidden, kv, intermediate)
            a, b = random.normal(size=(rank, num_in)), random.normal(size=(num_out, rank))
            tensors[f"{path}.lora_A.weight"] = (0.02 * a).astype(dtype)
            tensors[f"{path}.lora_B.weight"] = (0.02 * b).astype(dtype)
    return tensors


def adapter_config(
    *, rank: int = 8, alpha: float = 16, target_modules: Any = ("q_proj", "v_proj"), **config: Any
) -> dict[str, Any]:
    """Return adapter_config.json's fields as PEFT 0.21 writes them; `config` changes or adds some."""
    if isinstance(target_modules, tuple):
        target_modules = list(target_modules)
    fields = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "tiny-llama",
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": target_modules,
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    return {**fields, **config}


def to_bfloat16(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    """Return float32 tensors as `write_safetensors` takes them, cut to bfloat16."""
    return {n: ("BF16", (t.view(np.uint32) >> 16).astype(np.uint16)) for n, t in tensors.items()}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    """Write a safetensors file of types that numpy lacks: each tensor as its dtype's name and its bits."""
    header, pieces, at = {}, [], 0
    for name, (dtype, bits) in tensors.items():
        raw = bits.tobytes()
        shape = list(bits.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        pieces.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))
    return path


def make_adapter(
    folder: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    num_layers: int = 2,
    hidden: int = 64,
    kv: int = 32,
    intermediate: int = 128,
    dtype: Any = np.float32,
    seed: int = 0,
    tensors: Mapping[str, np.ndarray] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """Write a LoRA adapter's folder and return it.

    Args:
        folder: Where to; made if missing.
        rank: The LoRA's rank, of the tensors and the configuration.
        alpha: Its lora_alpha.
        target_modules: Last parts of the modules' names.
        num_layers: Layers that it covers, from 0.
        hidden: The base model's hidden size.
        kv: Its output size of k_proj and v_proj.
        intermediate: Its MLP's inner size.
        dtype: A numpy type of the tensors.
        seed: Of the tensors' values.
        tensors: Tensors instead of those made from the above.
        extra_tensors: Tensors beside them.
        config: Fields of adapter_config.json that replace the usual ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = lora_tensors(
            rank=rank,
            target_modules=target_modules,
            num_layers=num_layers,
            hidden=hidden,
            kv=kv,
            intermediate=intermediate,
            dtype=dtype,
            seed=seed,
        )
    named = {"target_modules": target_modules, **config}
    fields = adapter_config(rank=rank, alpha=alpha, **named)
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2))
    save_file({**tensors, **(extra_tensors or {})}, folder / "adapter_model.safetensors")
    return folder
