"""A base model as adapters see it: its configuration, its digest, its linear modules.

Owns the digest: what it covers, and that it is the same wherever the folder lies. Never loads weights. Used by the
registry and the linter.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adapters.errors import InvalidAdapter, InvalidBaseModel
from adapters.linear_shapes import LinearShapes, linear_shapes
from adapters.strict_json import read_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf"})
# The first covers the header of any file that the format allows; the others tell a fine-tuned copy, whose
# header is the same.
_HEAD_BYTES = 1024 * 1024
_SAMPLE_BYTES = 64 * 1024
_SAMPLES = 16
# Of what the download tools write, none says what the model computes.
_PASSING_KEYS = frozenset({"_name_or_path", "transformers_version"})


@dataclass(frozen=True)
class BaseModel:
    """One base model."""

    name: str
    """As replicas serve it."""
    config: Mapping[str, Any]
    """Its config.json."""
    digest: str
    """SHA-256 of its canonical config.json and of samples of its weight files."""

    @cached_property
    def shapes(self) -> LinearShapes | None:
        """Its linear modules; None if the architecture is not known, then shapes are not checked."""
        return linear_shapes(self.config)

    @property
    def has_tied_embeddings(self) -> bool:
        """Whether lm_head is embed_tokens (transformers writes the field where it is not the default)."""
        given = self.config.get("tie_word_embeddings")
        if isinstance(given, bool):
            return given
        return str(self.config.get("model_type")).startswith("gemma")

    @property
    def vocab_rows(self) -> int | None:
        """Rows of its embedding."""
        rows = self.config.get("vocab_size")
        return rows if type(rows) is int and rows > 0 else None


def read_base_model(folder: Path, name: str) -> BaseModel:
    """Read the base model of a folder.

    The digest covers config.json without what download tools add, and of each weight file its name, size, first MiB
    and 16 samples of 64 KiB at fixed places: reading 100 GB to name a model would take minutes.

    Args:
        folder: With config.json and *.safetensors or *.gguf.
        name: As replicas serve it.

    Raises:
        InvalidBaseModel: If config.json or the weights are missing or unreadable.
    """
    try:
        config = read_object(folder / CONFIG_FILE)
    except InvalidAdapter as error:
        raise InvalidBaseModel(f"Base model '{name}': {error}") from error
    digest = hashlib.sha256(_canonical(config))
    try:
        files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
        for path in files:
            digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            for sample in _samples(path):
                digest.update(sample)
    except OSError as error:
        raise InvalidBaseModel(
            f"Base model '{name}': its weights cannot be read: {error.strerror or error}."
        ) from error
    if not files:
        raise InvalidBaseModel(f"Base model '{name}' has neither *.safetensors nor *.gguf files.")
    return BaseModel(name, config, digest.hexdigest())


def _canonical(config: Mapping[str, Any]) -> bytes:
    lasting = {key: value for key, value in config.items() if key not in _PASSING_KEYS}
    return json.dumps(lasting, sort_keys=True, separators=(",", ":")).encode()


def _samples(path: Path) -> Iterator[bytes]:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        yield file.read(_HEAD_BYTES)
        for index in range(1, _SAMPLES + 1):
            at = (size_bytes * index) // _SAMPLES - _SAMPLE_BYTES
            if at > _HEAD_BYTES:
                file.seek(at)
                yield file.read(_SAMPLE_BYTES)
