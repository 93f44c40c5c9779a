"""A manifest as it is stored: with its own digest beside it, so that a flipped bit is found out.

Owns that form. Never reads or writes it anywhere. Called by `store.py`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import ValidationError

from adapters.digest import digest_of
from adapters.errors import CorruptObject
from adapters.manifest import Manifest


def sealed(manifest: Manifest) -> bytes:
    """Return what is stored: the manifest and the SHA-256 of its canonical bytes."""
    sha256_hex = hashlib.sha256(manifest.to_bytes()).hexdigest()
    fields = {"manifest": manifest.model_dump(mode="json"), "sha256_hex": sha256_hex}
    return json.dumps(fields, sort_keys=True, indent=1).encode()


def unsealed(content: bytes, path: str) -> Manifest:
    """Return the manifest of what was stored.

    Args:
        content: What `sealed` returned.
        path: Where it lies, for the message.

    Raises:
        CorruptObject: If a byte of it has changed.
    """
    try:
        fields: dict[str, Any] = json.loads(content)
        manifest = Manifest.model_validate_json(json.dumps(fields["manifest"]))
        sha256_hex = fields["sha256_hex"]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CorruptObject(f"{path} is not a manifest: push the version again.") from error
    is_whole = hashlib.sha256(manifest.to_bytes()).hexdigest() == sha256_hex
    if not is_whole or digest_of(manifest.files) != manifest.digest:
        raise CorruptObject(f"{path} was changed after it was written: push the version again.")
    return manifest
