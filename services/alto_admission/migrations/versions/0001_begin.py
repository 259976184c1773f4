"""Tasks, trials, metrics, events, the outbox, datasets, uploads and API keys.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("key_sha256", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("scopes", sa.String(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.Column("expire_us", sa.BigInteger(), nullable=True),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("key_id"),
        sa.UniqueConstraint("key_sha256"),
    )
    op.create_table(
        "datasets",
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("format", sa.Integer(), nullable=False),
        sa.Column("row_count", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("duplicate_count", sa.BigInteger(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("dataset_id"),
    )
    op.create_index("datasets_by_tenant", "datasets", ["tenant", "create_us", "dataset_id"])
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("request_hash", sa.String(), nullable=False),
        sa.Column("spec", sa.LargeBinary(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("validation_dataset_id", sa.String(), nullable=True),
        sa.Column("trial_count", sa.Integer(), nullable=False),
        sa.Column("samples_planned", sa.BigInteger(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("start_us", sa.BigInteger(), nullable=True),
        sa.Column("end_us", sa.BigInteger(), nullable=True),
        sa.Column("best_trial_id", sa.String(), nullable=True),
        sa.Column("best_validation_loss", sa.Double(), nullable=True),
        sa.Column("base_validation_loss", sa.Double(), nullable=True),
        sa.Column("queue_reason", sa.String(), nullable=False),
        sa.Column("queue_explanation", sa.String(), nullable=False),
        sa.Column("predicted_start_us", sa.BigInteger(), nullable=True),
        sa.Column("predicted_end_us", sa.BigInteger(), nullable=True),
        sa.Column("failure_reason", sa.String(), nullable=False),
        sa.Column("failure_message", sa.String(), nullable=False),
        sa.Column("samples_trained", sa.BigInteger(), nullable=False),
        sa.Column("trials_stopped", sa.Integer(), nullable=False),
        sa.Column("fraction_done", sa.Double(), nullable=False),
        sa.Column("time_remaining_us", sa.BigInteger(), nullable=True),
        sa.Column("node_id", sa.String(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("reported_sequence", sa.BigInteger(), nullable=False),
        sa.Column("last_event_sequence", sa.BigInteger(), nullable=False),
        sa.Column("earliest_event_sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("task_id"),
        sa.UniqueConstraint("tenant", "request_id", name="tasks_request"),
    )
    op.create_index("tasks_by_state", "tasks", ["state"])
    op.create_index("tasks_by_tenant", "tasks", ["tenant", "create_us", "task_id"])
    op.create_table(
        "uploads",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("request_hash", sa.String(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "request_id"),
    )
    op.create_table(
        "events",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "sequence"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name="events_task"),
    )
    op.create_table(
        "outbox",
        sa.Column(
            "outbox_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False, autoincrement=True
        ),
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("outbox_id"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name="outbox_task"),
    )
    op.create_index("outbox_by_task", "outbox", ["task_id", "outbox_id"])
    op.create_table(
        "task_labels",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "key"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name="task_labels_task"),
    )
    op.create_index("task_labels_by_value", "task_labels", ["key", "value"])
    op.create_table(
        "trials",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("trial_id", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("config", sa.LargeBinary(), nullable=False),
        sa.Column("total_steps", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("state_epoch", sa.BigInteger(), nullable=False),
        sa.Column("state_step", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("train_step", sa.BigInteger(), nullable=False),
        sa.Column("validation_step", sa.BigInteger(), nullable=False),
        sa.Column("train_loss_smoothed", sa.Double(), nullable=True),
        sa.Column("validation_loss", sa.Double(), nullable=True),
        sa.Column("best_validation_loss", sa.Double(), nullable=True),
        sa.Column("best_step", sa.BigInteger(), nullable=False),
        sa.Column("decision", sa.LargeBinary(), nullable=True),
        sa.Column("failure_reason", sa.String(), nullable=False),
        sa.Column("failure_message", sa.String(), nullable=False),
        sa.Column("adapter", sa.LargeBinary(), nullable=True),
        sa.Column("adapter_loss", sa.Double(), nullable=True),
        sa.Column("adapter_folder", sa.String(), nullable=False),
        sa.Column("samples_trained", sa.BigInteger(), nullable=False),
        sa.Column("stop_requested", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "trial_id"),
        sa.UniqueConstraint("task_id", "position", name="trials_position"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name="trials_task"),
    )
    op.create_table(
        "metrics",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("trial_id", sa.String(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("time_us", sa.BigInteger(), nullable=False),
        sa.Column("train_loss", sa.Double(), nullable=True),
        sa.Column("train_loss_smoothed", sa.Double(), nullable=True),
        sa.Column("validation_loss", sa.Double(), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("task_id", "trial_id", "step"),
        sa.ForeignKeyConstraint(["task_id", "trial_id"], ["trials.task_id", "trials.trial_id"], name="metrics_trial"),
    )


def downgrade() -> None:
    op.drop_table("metrics")
    op.drop_table("trials")
    op.drop_table("task_labels")
    op.drop_table("outbox")
    op.drop_table("events")
    op.drop_table("uploads")
    op.drop_table("tasks")
    op.drop_table("datasets")
    op.drop_table("api_keys")
