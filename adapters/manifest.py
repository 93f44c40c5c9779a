"""What an adapter version is: its manifest, written once and never changed.

Owns the manifest's fields and its bytes. Never reads an adapter's files (`digest.py`, `intake.py` do).
"""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MANIFEST_FORMAT: Literal["headrace.adapter/1"] = "headrace.adapter/1"
_SHA256 = r"^[0-9a-f]{64}$"
# No folders: an adapter's files lie beside each other, and a manifest cannot point out of its folder.
_FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class Frozen(BaseModel):
    """Base of the models here: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Frozen):
    """One file of a version."""

    path: str = Field(pattern=_FILE_NAME)
    """Its name in the adapter's folder."""
    size_bytes: int = Field(ge=0)
    sha256_hex: str = Field(pattern=_SHA256)


class BaseReference(Frozen):
    """The base model that a version was made for."""

    name: str
    """Public name, as replicas serve it."""
    digest: str | None = Field(default=None, pattern=_SHA256)
    """Of the base model's configuration and weights; None where it was not at hand."""


class Source(Frozen):
    """Where a version came from."""

    kind: Literal["upload", "path", "url", "run"]
    detail: str = ""
    """The object URL, or the id of the training run; never a path of somebody's machine."""


class Signature(Frozen):
    """A detached signature of the digest, kept as it was given."""

    key_id: str
    algorithm: str
    value_base64: str


class Manifest(Frozen):
    """One immutable, content-addressed adapter version.

    The digest covers the files alone, so that the same content is the same version whoever uploads it.
    """

    format: Literal["headrace.adapter/1"] = MANIFEST_FORMAT
    adapter: str
    digest: str = Field(pattern=_SHA256)
    files: tuple[FileEntry, ...] = Field(min_length=1)
    base: BaseReference
    rank: int = Field(ge=1)
    """The largest of its modules."""
    alpha: float
    target_modules: tuple[str, ...]
    dtype: str
    num_parameters: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    parent: str | None = None
    """Version that it was trained from, `name@digest12`."""
    source: Source
    created_at: str
    """RFC 3339, UTC."""
    signatures: tuple[Signature, ...] = ()

    @property
    def version(self) -> str:
        """`name@digest12`."""
        return f"{self.adapter}@{self.digest[:12]}"

    def to_bytes(self) -> bytes:
        """Return the manifest as canonical JSON: sorted keys, no spaces, UTF-8."""
        fields = self.model_dump(mode="json")
        return json.dumps(
            fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()
