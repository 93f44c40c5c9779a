"""Alembic's entry: migrates over the connection that `migrate.py` gives it."""

from __future__ import annotations

from alembic import context

from serving.control.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # `database.py` begins transactions on SQLite itself, so its DDL is undone with them.
    transactional_ddl=True,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
