"""Alembic's entry: `alto_common.database.Database.migrate` hands over its connection."""

from alembic import context
from alto_placement.store import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
