"""Assignments in another one's executor; tasks that train alone since an executor that they shared broke down."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("assignments", sa.Column("host_assignment_id", sa.String(64), nullable=False, server_default=""))
    op.add_column("tasks", sa.Column("alone", sa.Boolean, nullable=False, server_default=sa.false()))
