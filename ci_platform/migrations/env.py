"""What Alembic runs: upgrades over the connection that `store.migrate` hands in."""

from __future__ import annotations

from alembic import context

from ci_platform.model import Row

connection = context.config.attributes["connection"]
context.configure(
    connection=connection, target_metadata=Row.metadata, render_as_batch=True, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
connection.commit()
