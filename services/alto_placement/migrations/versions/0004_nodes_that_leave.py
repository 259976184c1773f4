"""Nodes that end in order say so."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("nodes", sa.Column("leaving", sa.Boolean, nullable=False, server_default=sa.false()))
