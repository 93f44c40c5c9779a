"""Adapters, versions, aliases, placements, audit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "audit_events",
    "goldens",
    "placements",
    "alias_changes",
    "aliases",
    "adapter_versions",
    "adapter_labels",
    "adapters",
    "control_state",
)


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "control_state",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.String(32), nullable=False),
        sa.Column("snapshot_version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_control_state_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_control_state")),
    )
    _create_adapters()
    _create_versions()
    _create_aliases()
    _create_placements()
    _create_audit()


def downgrade() -> None:
    """Go back to an empty database."""
    for table in TABLES:
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION refuse_audit_change()")


def _counter() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _create_adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", _counter(), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("created_at_s", sa.Double(), nullable=False),
        sa.Column("updated_at_s", sa.Double(), nullable=False),
        sa.Column("deleted_at_s", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("name", name=op.f("uq_adapters_name")),
    )
    op.create_index(op.f("ix_adapters_owner"), "adapters", ["owner"])
    op.create_table(
        "adapter_labels",
        sa.Column("adapter_id", _counter(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.String(256), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"],
            ["adapters.id"],
            name=op.f("fk_adapter_labels_adapter_id_adapters"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("adapter_id", "key", name=op.f("pk_adapter_labels")),
    )
    op.create_index("ix_adapter_labels_key_value", "adapter_labels", ["key", "value"])


def _create_versions() -> None:
    op.create_table(
        "adapter_versions",
        sa.Column("lora_id", _counter(), autoincrement=True, nullable=False),
        sa.Column("adapter_id", _counter(), nullable=False),
        sa.Column("name", sa.String(109), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("base", sa.String(256), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("created_at_s", sa.Double(), nullable=False),
        sa.Column("deleted_at_s", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name=op.f("fk_adapter_versions_adapter_id_adapters")
        ),
        sa.PrimaryKeyConstraint("lora_id", name=op.f("pk_adapter_versions")),
        sa.UniqueConstraint("name", name=op.f("uq_adapter_versions_name")),
        sqlite_autoincrement=True,
    )
    for column in ("adapter_id", "base", "digest"):
        op.create_index(op.f(f"ix_adapter_versions_{column}"), "adapter_versions", [column])


def _create_aliases() -> None:
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("target", sa.String(256), nullable=False),
        sa.Column("previous", sa.String(256), nullable=True),
        sa.Column("min_copies", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("created_at_s", sa.Double(), nullable=False),
        sa.Column("updated_at_s", sa.Double(), nullable=False),
        sa.Column("pending", sa.String(109), nullable=True),
        sa.Column("pending_reason", sa.Text(), nullable=True),
        sa.Column("pending_since_s", sa.Double(), nullable=True),
        sa.Column("pending_by", sa.String(200), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_aliases")),
    )
    for column in ("pending", "previous", "target"):
        op.create_index(op.f(f"ix_aliases_{column}"), "aliases", [column])
    op.create_table(
        "alias_changes",
        sa.Column("id", _counter(), nullable=False),
        sa.Column("alias", sa.String(96), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("before", sa.String(256), nullable=True),
        sa.Column("after", sa.String(256), nullable=True),
        sa.Column("principal", sa.String(200), nullable=False),
        sa.Column("at_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alias_changes")),
    )
    op.create_index("ix_alias_changes_alias_id", "alias_changes", ["alias", "id"])


def _create_placements() -> None:
    op.create_table(
        "placements",
        sa.Column("replica", sa.String(255), nullable=False),
        sa.Column("version", sa.String(109), nullable=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("num_attempts", sa.Integer(), nullable=False),
        sa.Column("retry_at_s", sa.Double(), nullable=True),
        sa.Column("load_s", sa.Double(), nullable=True),
        sa.Column("ready_at_s", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["version"],
            ["adapter_versions.name"],
            name=op.f("fk_placements_version_adapter_versions"),
        ),
        sa.PrimaryKeyConstraint("replica", "version", name=op.f("pk_placements")),
    )
    op.create_index(op.f("ix_placements_version"), "placements", ["version"])
    op.create_table(
        "goldens",
        sa.Column("version", sa.String(109), nullable=False),
        sa.Column("engine_kind", sa.String(32), nullable=False),
        sa.Column("logprobs", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["version"], ["adapter_versions.name"], name=op.f("fk_goldens_version_adapter_versions")
        ),
        sa.PrimaryKeyConstraint("version", "engine_kind", name=op.f("pk_goldens")),
    )


def _create_audit() -> None:
    op.create_table(
        "audit_events",
        sa.Column("id", _counter(), nullable=False),
        sa.Column("at_s", sa.Double(), nullable=False),
        sa.Column("principal", sa.String(200), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("subject", sa.String(256), nullable=False),
        sa.Column("before", sa.JSON(), nullable=True),
        sa.Column("after", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
    )
    op.create_index("ix_audit_events_kind_subject", "audit_events", ["kind", "subject", "id"])
    op.create_index(op.f("ix_audit_events_principal"), "audit_events", ["principal"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'audit events are never changed'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE ON audit_events "
            "FOR EACH ROW EXECUTE FUNCTION refuse_audit_change()"
        )
        return
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_events_no_{change.lower()} BEFORE {change} ON audit_events "
            "BEGIN SELECT RAISE(ABORT, 'audit events are never changed'); END"
        )
