"""Turns the `--model` of a user into something that an engine can load.

Owns: what counts as a model (the default's name, a local folder, a Hugging Face id), its public
name, and what its configuration says about memory. Never: imports torch or loads weights.
Called by: `serving/fleet/local_platform.py` and `serving/fleet/doctor.py`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import ConfigError
from serving.fleet import default_model

if TYPE_CHECKING:
    from collections.abc import Callable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHT_SUFFIXES = ("*.safetensors", "*.bin", "*.pt")
GIB = 1 << 30
KV_BYTES_PER_VALUE = 2
# Full-length requests that the KV cache should hold at once, where memory is ours to choose.
FULL_LENGTH_REQUESTS = 4
# For a model whose configuration is not on this disk yet.
UNKNOWN_KV_CACHE_GIB = 4


@dataclass(frozen=True)
class ModelSource:
    """A model that an engine can load."""

    served_name: str
    """Public name."""
    location: str
    """Folder or Hugging Face id: what the engine's `--model` gets."""
    is_local: bool
    tool_call_parser: str | None = None
    weights_bytes: int = 0
    """Size of the weights; 0 where they are not on this disk."""
    kv_cache_gib: int = UNKNOWN_KV_CACHE_GIB
    """A KV cache that holds a few requests of full length."""


def resolve(model: str, cache_dir: Path, report: Callable[[str, float], None]) -> ModelSource:
    """Return the model that a user means, made ready on this disk if it is the default one.

    Args:
        model: the default model's name, a folder, or a Hugging Face id.
        cache_dir: `HEADRACE_CACHE_DIR`.
        report: called with a stage and its fraction done while the default model is made.

    Raises:
        ConfigError: if it is none of these, or a folder that is not a model.
    """
    if model == default_model.NAME:
        return _local(default_model.ensure(cache_dir, report), model, tool_call_parser="hermes")
    path = Path(model).expanduser()
    if model and path.is_dir():
        folder = path.resolve()
        return _local(folder, folder.name)
    if path.is_file():
        msg = f"--model {model}: this is a file; give the folder that holds config.json"
        raise ConfigError(msg)
    if HUB_ID.fullmatch(model) and not model.startswith((".", "~")):
        return ModelSource(served_name=model, location=model, is_local=False)
    msg = (
        f"--model {model}: neither {default_model.NAME}, nor an existing folder, nor a Hugging Face"
        " id (ORGANISATION/NAME)"
    )
    raise ConfigError(msg)


def _local(folder: Path, served_name: str, tool_call_parser: str | None = None) -> ModelSource:
    try:
        config: Any = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        msg = f"--model {folder}: no config.json in it; give a folder that save_pretrained wrote"
        raise ConfigError(msg) from None
    except (OSError, ValueError) as error:
        msg = f"--model {folder}: config.json cannot be read: {error}"
        raise ConfigError(msg) from None
    weights = {path for suffix in WEIGHT_SUFFIXES for path in folder.glob(suffix)}
    if not weights:
        msg = f"--model {folder}: no weights (*.safetensors) in it; give a whole model, not an adapter"
        raise ConfigError(msg)
    return ModelSource(
        served_name=served_name,
        location=str(folder),
        is_local=True,
        tool_call_parser=tool_call_parser,
        weights_bytes=sum(path.stat().st_size for path in weights),
        kv_cache_gib=kv_cache_gib(config),
    )


def kv_cache_gib(config: dict[str, Any]) -> int:
    """Return the whole GiB that hold a few requests of the model's full length.

    Keys and values of each layer and token: 2 x layers x KV heads x head size x 2 bytes.

    Args:
        config: a model's `config.json`; what it does not say is taken as unknown.
    """
    text = config.get("text_config", config)
    try:
        heads = int(text["num_attention_heads"])
        head_size = int(text.get("head_dim") or text["hidden_size"] // heads)
        kv_heads = int(text.get("num_key_value_heads") or heads)
        layers, length_tokens = int(text["num_hidden_layers"]), int(text["max_position_embeddings"])
    except (KeyError, TypeError, ValueError):
        return UNKNOWN_KV_CACHE_GIB
    token_bytes = 2 * layers * kv_heads * head_size * KV_BYTES_PER_VALUE
    needed_bytes = token_bytes * length_tokens * FULL_LENGTH_REQUESTS
    return min(UNKNOWN_KV_CACHE_GIB, max(1, math.ceil(needed_bytes / GIB)))
