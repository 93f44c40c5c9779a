"""Adapters that differ from a plain one in one thing each, by name: the rows of the linter's tables."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from adapter_folders import (
    ALL_LINEAR,
    lora_tensors,
    make_adapter,
    to_bfloat16,
    write_safetensors,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LAYER = "base_model.model.model.layers.0"
EMBED = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"


def rows(*shape: int) -> np.ndarray:
    """Return small numbers, never zero."""
    return np.full(shape, 0.01, np.float32)


def magnitudes() -> dict[str, np.ndarray]:
    """Return DoRA's vectors for a plain adapter."""
    names = [name for name in lora_tensors() if name.endswith("lora_B.weight")]
    return {
        name.replace("lora_B.weight", "lora_magnitude_vector"): rows(len(lora_tensors()[name]))
        for name in names
    }


def of_ranks(q: int, v: int) -> dict[str, np.ndarray]:
    """Return tensors whose q_proj and v_proj have different ranks."""
    of_q = lora_tensors(rank=q, target_modules=("q_proj",))
    return {**of_q, **lora_tensors(rank=v, target_modules=("v_proj",))}


def renamed(old: str, new: str) -> dict[str, np.ndarray]:
    """Return a plain adapter's tensors with a part of each name replaced."""
    return {name.replace(old, new): tensor for name, tensor in lora_tensors().items()}


def without(end: str) -> dict[str, np.ndarray]:
    """Return a plain adapter's tensors but for one whose name ends so."""
    return {n: t for n, t in lora_tensors().items() if not n.endswith(end)}


def embedding(vocab: int = 256) -> dict[str, np.ndarray]:
    """Return the LoRA of the embedding, as PEFT shapes it."""
    return {
        f"{EMBED}.lora_embedding_A": rows(8, vocab),
        f"{EMBED}.lora_embedding_B": rows(64, 8),
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linear": {"target_modules": ALL_LINEAR},
    "all-linear by name": {"config": {"target_modules": "all-linear"}},
    "expression": {"config": {"target_modules": r".*\.(q|v)_proj"}},
    "no target_modules": {"drop": ("target_modules",)},
    "null target_modules": {"config": {"target_modules": None}},
    "q alone": {"target_modules": ("q_proj",)},
    "k and v": {"target_modules": ("k_proj", "v_proj")},
    "gate alone": {"target_modules": ("gate_proj",)},
    "up alone": {"target_modules": ("up_proj",)},
    "one layer": {"num_layers": 1},
    "rank 1": {"rank": 1},
    "rank 12": {"rank": 12},
    "rank 32": {"rank": 32},
    "float16": {"dtype": np.float16},
    "bfloat16": {"bfloat16": True},
    "float64": {"dtype": np.float64},
    "int8": {"tensors": {n: np.ones_like(t, np.int8) for n, t in lora_tensors().items()}},
    "rslora": {"config": {"use_rslora": True}},
    "rslora of rank 1": {"rank": 1, "config": {"use_rslora": True}},
    "dora": {"config": {"use_dora": True}, "extra_tensors": magnitudes()},
    "dora undeclared": {"extra_tensors": magnitudes()},
    "rank_pattern": {"tensors": of_ranks(8, 16), "config": {"rank_pattern": {"v_proj": 16}}},
    "rank_pattern too large": {
        "tensors": of_ranks(8, 32),
        "config": {"rank_pattern": {"v_proj": 32}},
    },
    "rank_pattern of nothing": {"config": {"rank_pattern": {"o_proj": 16}}},
    "alpha_pattern": {"config": {"alpha_pattern": {"v_proj": 64}}},
    "alpha_pattern expression": {"config": {"alpha_pattern": {r"layers\.0\..*v_proj": 64}}},
    "alpha 0": {"alpha": 0},
    "alpha negative": {"alpha": -16},
    "bias all": {
        "config": {"bias": "all"},
        "extra_tensors": {f"{LAYER}.self_attn.q_proj.base_layer.bias": rows(64)},
    },
    "lora_bias": {
        "config": {"lora_bias": True},
        "extra_tensors": {f"{LAYER}.self_attn.q_proj.lora_B.bias": rows(64)},
    },
    "lm_head saved": {
        "config": {"modules_to_save": ["lm_head"]},
        "extra_tensors": {f"{HEAD}.weight": rows(256, 64)},
    },
    "score saved": {
        "config": {"modules_to_save": ["score"]},
        "extra_tensors": {"base_model.model.score.weight": rows(2, 64)},
    },
    "norm saved": {
        "config": {"modules_to_save": ["input_layernorm"]},
        "extra_tensors": {f"{LAYER}.input_layernorm.weight": rows(64)},
    },
    "embedding": {
        "config": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        "extra_tensors": embedding(),
    },
    "embedding of other rows": {"extra_tensors": embedding(300)},
    "embedding transposed": {
        "extra_tensors": {
            f"{EMBED}.lora_embedding_A": rows(256, 8),
            f"{EMBED}.lora_embedding_B": rows(8, 64),
        }
    },
    "lm_head": {
        "config": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        "extra_tensors": {
            f"{HEAD}.lora_A.weight": rows(8, 64),
            f"{HEAD}.lora_B.weight": rows(256, 8),
        },
    },
    "embedding copied": {"extra_tensors": {f"{EMBED}.base_layer.weight": rows(256, 64)}},
    "embedding resized": {"extra_tensors": {f"{EMBED}.base_layer.weight": rows(300, 64)}},
    "embedding saved": {"extra_tensors": {f"{EMBED}.weight": rows(300, 64)}},
    "token rows": {
        "config": {"trainable_token_indices": [3]},
        "extra_tensors": {f"{EMBED}.token_adapter.trainable_tokens_delta": rows(1, 64)},
    },
    "added tokens": {"files": {"added_tokens.json": b'{"<tool>": 256}'}},
    "added tokens of the base": {"files": {"added_tokens.json": b'{"<tool>": 255}'}},
    "new embeddings": {"files": {"new_embeddings.safetensors": b"\2\0\0\0\0\0\0\0{}"}},
    "pissa": {"config": {"init_lora_weights": "pissa"}},
    "pissa of n": {"config": {"init_lora_weights": "pissa_niter_16"}},
    "olora": {"config": {"init_lora_weights": "olora"}},
    "corda": {"config": {"init_lora_weights": "corda"}},
    "loftq": {"config": {"init_lora_weights": "loftq"}},
    "eva": {"config": {"init_lora_weights": "eva"}},
    "gaussian": {"config": {"init_lora_weights": "gaussian"}},
    "no init": {"config": {"init_lora_weights": False}},
    "alora": {"config": {"alora_invocation_tokens": [1, 2]}},
    "layer_replication": {"num_layers": 3, "config": {"layer_replication": [[0, 2], [1, 2]]}},
    "qalora": {
        "tensors": {n: t[:, :4].copy() if "lora_A" in n else t for n, t in lora_tensors().items()},
        "config": {"use_qalora": True},
    },
    "bdlora": {"config": {"use_bdlora": {"nblocks": 2}}},
    "arrow": {"config": {"arrow_config": {"top_k": 2}}},
    "target_parameters": {
        "tensors": {
            f"{LAYER}.mlp.experts.lora_A.weight": rows(16, 64),
            f"{LAYER}.mlp.experts.lora_B.weight": rows(64, 16),
        },
        "config": {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []},
    },
    "megatron": {"config": {"megatron_config": {"tensor_model_parallel_size": 2}}},
    "layers_to_transform": {"num_layers": 1, "config": {"layers_to_transform": [0]}},
    "exclude_modules": {"config": {"exclude_modules": ["o_proj"]}},
    "fan_in_fan_out": {"config": {"fan_in_fan_out": True}},
    "unknown tensor": {"extra_tensors": {f"{LAYER}.self_attn.q_proj.lora_E": rows(8, 1)}},
    "unknown outside layers": {"extra_tensors": {"base_model.model.prompt": rows(4, 64)}},
    "named adapter": {"tensors": renamed("lora_A.", "lora_A.default.")},
    "no prefix": {"tensors": renamed("base_model.model.", "")},
    "module of another model": {"tensors": renamed("q_proj", "c_attn")},
    "module in a wrong place": {"tensors": renamed("self_attn", "attention")},
    "layer too many": {"num_layers": 3},
    "wider base": {"hidden": 128},
    "narrower base": {"hidden": 32, "kv": 32},
    "other kv heads": {"kv": 64},
    "r of another": {"config": {"r": 4}},
    "A without B": {"tensors": without("layers.0.self_attn.q_proj.lora_B.weight")},
    "A without B, scale 1": {
        "alpha": 8,
        "tensors": without("layers.0.self_attn.q_proj.lora_B.weight"),
    },
    "B without A": {"tensors": without("layers.0.self_attn.q_proj.lora_A.weight")},
    "other base name": {"config": {"base_model_name_or_path": "meta/other"}},
    "pickle beside": {"files": {"training_args.bin": b"x"}},
}


def make_case(folder: Path, name: str) -> Path:
    """Write the adapter of a case."""
    case = dict(CASES[name])
    files, drop = case.pop("files", {}), case.pop("drop", ())
    is_bfloat16, fields = case.pop("bfloat16", False), case.pop("config", {})
    make_adapter(folder, **case)
    change_config(folder, fields, drop)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    if is_bfloat16:
        write_safetensors(folder / "adapter_model.safetensors", to_bfloat16(lora_tensors()))
    return folder


def change_config(folder: Path, fields: Mapping[str, Any], drop: Sequence[str] = ()) -> None:
    """Set fields of adapter_config.json, and take some out."""
    path = folder / "adapter_config.json"
    changed = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in changed.items() if k not in drop}))
