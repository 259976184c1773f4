"""Nodes, tasks and assignments."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "nodes",
        sa.Column("node_id", sa.String(128), primary_key=True),
        sa.Column("incarnation", sa.String(64), nullable=False),
        sa.Column("gpu_kind", sa.String(64), nullable=False),
        sa.Column("gpus", sa.Integer, nullable=False),
        sa.Column("memory_bytes_per_gpu", sa.BigInteger, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("cordoned", sa.Boolean, nullable=False),
        sa.Column("draining", sa.Boolean, nullable=False),
        sa.Column("lost", sa.Boolean, nullable=False),
        sa.Column("last_seen_s", sa.Double, nullable=False),
        sa.Column("superseded", sa.JSON, nullable=False),
    )
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("work", sa.LargeBinary, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("gpus", sa.Integer, nullable=False),
        sa.Column("gpu_kind", sa.String(64), nullable=False),
        sa.Column("size", sa.JSON, nullable=False),
        sa.Column("enqueued_s", sa.Double, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("held", sa.Boolean, nullable=False),
        sa.Column("dequeued", sa.Boolean, nullable=False),
        sa.Column("stopped_trial_ids", sa.JSON, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("assignment_id", sa.String(64), nullable=False),
        sa.Column("fraction_done", sa.Double, nullable=False),
        sa.Column("ended", sa.String(16)),
        sa.Column("ended_s", sa.Double),
        sa.Column("failure", sa.JSON(none_as_null=True)),
    )
    op.create_index("tasks_ended", "tasks", ["ended", "ended_s"])
    op.create_table(
        "assignments",
        sa.Column("assignment_id", sa.String(64), primary_key=True),
        sa.Column("task_id", sa.String(64), sa.ForeignKey("tasks.task_id"), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("node_id", sa.String(128), sa.ForeignKey("nodes.node_id"), nullable=False),
        sa.Column("incarnation", sa.String(64), nullable=False),
        sa.Column("gpu_indices", sa.JSON, nullable=False),
        sa.Column("started_s", sa.Double, nullable=False),
        sa.Column("stop", sa.String(16)),
        sa.Column("outcome", sa.String(24)),
        sa.Column("ended_s", sa.Double),
        sa.UniqueConstraint("task_id", "epoch", name="assignments_task_epoch"),
    )
    op.create_index(
        "assignments_one_live",
        "assignments",
        ["task_id"],
        unique=True,
        sqlite_where=sa.text("outcome IS NULL"),
        postgresql_where=sa.text("outcome IS NULL"),
    )
