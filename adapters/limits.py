"""Bounds on what is taken as an adapter.

Owns the numbers. Never enforces one (`archive.py`, `intake.py` do). Set by the platform's settings.
"""

from __future__ import annotations

from pydantic import Field

from adapters.manifest import Frozen

GIB = 1024**3
MIB = 1024**2


class IntakeLimits(Frozen):
    """How large an adapter may be, as it is sent and as it is kept."""

    max_archive_bytes: int = Field(default=4 * GIB + 64 * MIB, ge=1)
    """Of a tar, packed and unpacked."""
    max_total_bytes: int = Field(default=4 * GIB, ge=1)
    """Of the files that are kept."""
    max_weights_bytes: int = Field(default=4 * GIB, ge=1)
    """Of adapter_model.safetensors."""
    max_text_bytes: int = Field(default=64 * MIB, ge=1)
    """Of each other file; a large tokenizer.json has 35 MB."""
    max_members: int = Field(default=64, ge=2)
    """Files and folders sent, with those that are passed over."""
