"""The control plane's tables.

Owns columns, keys and bounds. Never queries. Changes need a migration beside them in `migrations/`.
Times are Unix seconds. Versions are named `name@digest12` wherever they are referred to; a target
without "@" is a base model's public name.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

NAME_CHARS = 96
VERSION_CHARS = NAME_CHARS + 13
TARGET_CHARS = 256
PRINCIPAL_CHARS = 200
REPLICA_CHARS = 255
STATE_ROW = 1

# SQLite counts only in INTEGER PRIMARY KEY.
_Counter = BigInteger().with_variant(Integer(), "sqlite")


class Base(DeclarativeBase):
    """Base of the tables; constraints have names, so that migrations can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class State(Base):
    """The one row that identifies the database and counts its published changes."""

    __tablename__ = "control_state"
    __table_args__ = (CheckConstraint(f"id = {STATE_ROW}", name="one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    epoch: Mapped[str] = mapped_column(String(32))
    snapshot_version: Mapped[int] = mapped_column(BigInteger)


class Adapter(Base):
    """A name that versions are registered under."""

    __tablename__ = "adapters"

    id: Mapped[int] = mapped_column(_Counter, primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_CHARS), unique=True)
    owner: Mapped[str] = mapped_column(String(PRINCIPAL_CHARS), index=True)
    description: Mapped[str] = mapped_column(Text)
    revision: Mapped[int]
    created_at_s: Mapped[float]
    updated_at_s: Mapped[float]
    deleted_at_s: Mapped[float | None]

    labels: Mapped[list[Label]] = relationship(
        cascade="all, delete-orphan", lazy="selectin", order_by="Label.key"
    )


class Label(Base):
    """One label of an adapter."""

    __tablename__ = "adapter_labels"
    __table_args__ = (Index("ix_adapter_labels_key_value", "key", "value"),)

    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True
    )
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(256))


class Version(Base):
    """One immutable version; its key is its `lora_id`, which is never given again."""

    __tablename__ = "adapter_versions"
    __table_args__ = ({"sqlite_autoincrement": True},)

    lora_id: Mapped[int] = mapped_column(_Counter, primary_key=True, autoincrement=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id"), index=True)
    name: Mapped[str] = mapped_column(String(VERSION_CHARS), unique=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    base: Mapped[str] = mapped_column(String(TARGET_CHARS), index=True)
    rank: Mapped[int]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    manifest: Mapped[str] = mapped_column(Text)
    report: Mapped[dict[str, Any]] = mapped_column(JSON)
    """What the linter said, as the API shows it."""
    created_by: Mapped[str] = mapped_column(String(PRINCIPAL_CHARS))
    created_at_s: Mapped[float]
    deleted_at_s: Mapped[float | None]

    adapter: Mapped[Adapter] = relationship(lazy="raise")


class Alias(Base):
    """A public model name, where it points and where it shall point."""

    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(String(NAME_CHARS), primary_key=True)
    target: Mapped[str] = mapped_column(String(TARGET_CHARS), index=True)
    previous: Mapped[str | None] = mapped_column(String(TARGET_CHARS), index=True)
    """The distinct target before this one: where a rollback goes."""
    min_copies: Mapped[int]
    owner: Mapped[str] = mapped_column(String(PRINCIPAL_CHARS))
    description: Mapped[str] = mapped_column(Text)
    revision: Mapped[int]
    created_at_s: Mapped[float]
    updated_at_s: Mapped[float]
    pending: Mapped[str | None] = mapped_column(String(VERSION_CHARS), index=True)
    """The version that a flip waits for, or last failed to reach."""
    pending_reason: Mapped[str | None] = mapped_column(Text)
    """Why that flip was given up; None while it waits."""
    pending_since_s: Mapped[float | None]
    pending_by: Mapped[str | None] = mapped_column(String(PRINCIPAL_CHARS))


class AliasChange(Base):
    """One target that an alias has had; never rewritten."""

    __tablename__ = "alias_changes"
    __table_args__ = (Index("ix_alias_changes_alias_id", "alias", "id"),)

    id: Mapped[int] = mapped_column(_Counter, primary_key=True)
    alias: Mapped[str] = mapped_column(String(NAME_CHARS))
    revision: Mapped[int]
    action: Mapped[str] = mapped_column(String(16))
    before: Mapped[str | None] = mapped_column(String(TARGET_CHARS))
    after: Mapped[str | None] = mapped_column(String(TARGET_CHARS))
    principal: Mapped[str] = mapped_column(String(PRINCIPAL_CHARS))
    at_s: Mapped[float]


class Placed(Base):
    """One version on one replica."""

    __tablename__ = "placements"

    replica: Mapped[str] = mapped_column(String(REPLICA_CHARS), primary_key=True)
    version: Mapped[str] = mapped_column(
        ForeignKey("adapter_versions.name"), primary_key=True, index=True
    )
    phase: Mapped[str] = mapped_column(String(16))
    path: Mapped[str] = mapped_column(Text)
    reason: Mapped[str | None] = mapped_column(Text)
    num_attempts: Mapped[int]
    retry_at_s: Mapped[float | None]
    load_s: Mapped[float | None]
    ready_at_s: Mapped[float | None]


class Golden(Base):
    """The logprobs that a version was first proven with on an engine kind."""

    __tablename__ = "goldens"

    version: Mapped[str] = mapped_column(ForeignKey("adapter_versions.name"), primary_key=True)
    engine_kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    logprobs: Mapped[list[float]] = mapped_column(JSON)


class AuditEvent(Base):
    """Who changed what, and when; the database refuses to change or delete rows."""

    __tablename__ = "audit_events"
    __table_args__ = (Index("ix_audit_events_kind_subject", "kind", "subject", "id"),)

    id: Mapped[int] = mapped_column(_Counter, primary_key=True)
    at_s: Mapped[float]
    principal: Mapped[str] = mapped_column(String(PRINCIPAL_CHARS), index=True)
    request_id: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(32))
    kind: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str] = mapped_column(String(TARGET_CHARS))
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON)
