"""Base models: the digest says which one, the shapes say where a LoRA fits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from adapter_folders import LLAMA, make_base
from safetensors.numpy import save_file

from adapters.base_model import BaseModel, read_base_model
from adapters.errors import InvalidBaseModel


def model(**config):
    """Return a base model of some configuration."""
    return BaseModel("m", {**LLAMA, **config}, "0" * 64)


def test_the_digest_does_not_depend_on_place_or_order(tmp_path):
    """The same files elsewhere, config.json written otherwise: the same model."""
    first = read_base_model(make_base(tmp_path / "a"), "m")
    folder = make_base(tmp_path / "b")
    fields = json.loads((folder / "config.json").read_text())
    moved = {**dict(reversed(fields.items())), "_name_or_path": "x", "transformers_version": "5"}
    (folder / "config.json").write_text(json.dumps(moved, indent=4))
    assert read_base_model(folder, "other").digest == first.digest


def test_the_digest_tells_weights_and_configurations_apart(tmp_path):
    """Other numbers of the same shapes, or another field, make another model."""
    plain = read_base_model(make_base(tmp_path / "a"), "m").digest
    tuned = make_base(tmp_path / "b")
    save_file(
        {"model.embed_tokens.weight": np.ones((256, 64), np.float16)}, tuned / "model.safetensors"
    )
    scaled = make_base(tmp_path / "c", rms_norm_eps=1e-6)
    digests = {plain, read_base_model(tuned, "m").digest, read_base_model(scaled, "m").digest}
    assert len(digests) == 3


def test_large_files_are_sampled_to_their_end(tmp_path):
    """A change near the end of a large file changes the digest."""
    folder = make_base(tmp_path / "a")
    weights = folder / "model.gguf"
    weights.write_bytes(b"GGUF" + bytes(4_000_000))
    before = read_base_model(folder, "m").digest
    with weights.open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"x")
    assert read_base_model(folder, "m").digest != before


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_either_is_none(tmp_path, missing):
    """A configuration and weights: both or an error."""
    folder = make_base(tmp_path / "a")
    (folder / missing).unlink()
    with pytest.raises(InvalidBaseModel, match="Base model 'm'"):
        read_base_model(folder, "m")


@pytest.mark.parametrize(
    ("config", "module", "size"),
    [
        ({}, "model.layers.1.self_attn.q_proj", (64, 64)),
        ({}, "model.layers.1.self_attn.k_proj", (64, 32)),
        ({}, "model.layers.0.mlp.down_proj", (128, 64)),
        ({}, "model.embed_tokens", (256, 64)),
        ({}, "lm_head", (64, 256)),
        ({}, "model.layers.2.self_attn.q_proj", None),
        ({}, "model.layers.01.self_attn.q_proj", None),
        ({}, "model.layers.-1.self_attn.q_proj", None),
        ({}, "model.layers.0.self_attn.qkv_proj", None),
        ({}, "model.layers.0.mlp.q_proj", None),
        ({"head_dim": None}, "model.layers.0.self_attn.v_proj", (64, 32)),
        ({"model_type": "qwen3", "head_dim": 32}, "model.layers.0.self_attn.o_proj", (128, 64)),
        ({"model_type": "gemma2"}, "model.layers.0.mlp.gate_proj", (64, 128)),
        ({"model_type": "phi3"}, "model.layers.0.self_attn.qkv_proj", (64, 128)),
        ({"model_type": "phi3"}, "model.layers.0.mlp.gate_up_proj", (64, 256)),
        ({"model_type": "phi3"}, "model.layers.0.self_attn.q_proj", None),
        (
            {"model_type": "mixtral", "num_local_experts": 4},
            "model.layers.0.block_sparse_moe.experts.3.w2",
            (128, 64),
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 48},
            "model.layers.0.mlp.experts.1.up_proj",
            (64, 48),
        ),
        (
            {
                "model_type": "qwen3_moe",
                "num_experts": 2,
                "moe_intermediate_size": 48,
                "mlp_only_layers": [0],
            },
            "model.layers.0.mlp.up_proj",
            (64, 128),
        ),
        (
            {
                "model_type": "qwen2_moe",
                "num_experts": 2,
                "moe_intermediate_size": 48,
                "shared_expert_intermediate_size": 96,
            },
            "model.layers.1.mlp.shared_expert.down_proj",
            (96, 64),
        ),
    ],
)
def test_the_sizes_of_linear_modules(config, module, size):
    """In and out of a module, None where the model has no such linear."""
    assert model(**config).shapes.size_of(module) == size


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba"},
        {"model_type": None},
        {"hidden_size": "64"},
        {"hidden_size": 0},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": True},
        {"vocab_size": None},
        {"model_type": "mixtral", "num_local_experts": 10**9},
    ],
)
def test_what_is_not_known_for_sure_is_not_said(config):
    """An unknown architecture or an impossible size gives no shapes."""
    assert model(**config).shapes is None


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None, "model_type": "gemma2"}, True),
        ({"tie_word_embeddings": None}, False),
    ],
)
def test_tied_embeddings(config, tied):
    """The field, or the architecture's default."""
    assert model(**config).has_tied_embeddings is tied
