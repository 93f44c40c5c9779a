"""Bodies of the alias routes."""

from __future__ import annotations

from enum import StrEnum

from pydantic import ConfigDict, Field

from serving.control.shapes.common import Shape
from serving.control.tables import TARGET_CHARS


class AliasState(StrEnum):
    """Whether an alias is where it shall be."""

    SERVING = "serving"
    PENDING = "pending"
    FAILED = "failed"


class PutAlias(Shape):
    """Where an alias shall point, and how many replicas have its version at all times."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"target": "support@0a1b2c3d4e5f", "min_copies": 2, "revision": 3}]
        }
    )

    target: str = Field(min_length=1, max_length=TARGET_CHARS)
    """A version, `name@digest12`, or a base model's public name."""
    min_copies: int | None = Field(default=None, ge=0, le=1024)
    """Replicas that always have the version; 0 loads it when it is asked for. None keeps it."""
    revision: int | None = Field(default=None, ge=0)
    """The alias's revision as the caller knows it, 0 for none yet; None overwrites whatever is there."""
    owner: str | None = Field(default=None, max_length=200)
    """None keeps it; a new alias is its creator's."""
    description: str | None = Field(default=None, max_length=4000)
    """None keeps it."""


class RollbackAlias(Shape):
    """Body of a rollback; may be left out."""

    revision: int | None = Field(default=None, ge=1)
    """The alias's revision as the caller knows it."""


class PendingTarget(Shape):
    """A version that an alias shall point at, or was meant to."""

    target: str
    reason: str | None
    """Why the flip was given up; null while it waits."""
    since: float
    """Unix time."""
    num_ready: int
    """Replicas where the version is proven."""
    num_needed: int
    """Replicas where it has to be before the alias flips."""
    replicas: dict[str, str]
    """Replica → where the version stands there, with the reason of a failure."""


class AliasAnswer(Shape):
    """An alias."""

    alias: str
    target: str
    previous: str | None
    """Where a rollback goes."""
    state: AliasState
    pending: PendingTarget | None
    min_copies: int
    owner: str
    description: str
    revision: int
    """Changes with every change; also the `ETag`."""
    created_at: float
    """Unix time."""
    updated_at: float
    """Unix time."""


class AliasChangeAnswer(Shape):
    """One entry of an alias's history."""

    id: int
    action: str
    """`create`, `flip`, `rollback`, `request`, `cancel`, `fail` or `delete`."""
    before: str | None
    after: str | None
    revision: int
    principal: str
    at: float
    """Unix time."""
