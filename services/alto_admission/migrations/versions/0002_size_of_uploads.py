"""What an unfinished upload will take, to be counted in its tenant's quota."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("uploads", sa.Column("size_bytes", sa.BigInteger(), nullable=False, server_default="0"))
