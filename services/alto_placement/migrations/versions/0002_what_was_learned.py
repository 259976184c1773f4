"""What was learned of durations and of tenants' usage; on which node a task's checkpoint lies."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "learned",
        sa.Column("name", sa.String(512), primary_key=True),
        sa.Column("content", sa.JSON, nullable=False),
    )
    op.add_column("tasks", sa.Column("ran_on", sa.String(128), nullable=False, server_default=""))
    op.add_column("tasks", sa.Column("keeps_turn", sa.Boolean, nullable=False, server_default=sa.false()))
