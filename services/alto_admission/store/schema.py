"""The tables. `migrations` makes them; a test compares the two.

Times are microseconds since the epoch (UTC) in big integers: both engines keep them alike, and order them.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData()


def _column(name: str, kind: Any, *, nullable: bool = False, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=nullable, **options)


tasks = sa.Table(
    "tasks",
    metadata,
    _column("task_id", sa.String, primary_key=True),
    _column("tenant", sa.String),
    _column("request_id", sa.String),
    _column("request_hash", sa.String),
    _column("spec", sa.LargeBinary),
    _column("base_model", sa.String),
    _column("dataset_id", sa.String),
    _column("validation_dataset_id", sa.String, nullable=True),
    _column("trial_count", sa.Integer),
    _column("samples_planned", sa.BigInteger),
    _column("create_us", sa.BigInteger),
    _column("state", sa.Integer),
    _column("revision", sa.BigInteger),
    _column("start_us", sa.BigInteger, nullable=True),
    _column("end_us", sa.BigInteger, nullable=True),
    _column("best_trial_id", sa.String, nullable=True),
    _column("best_validation_loss", sa.Double, nullable=True),
    _column("base_validation_loss", sa.Double, nullable=True),
    _column("queue_reason", sa.String),
    _column("queue_explanation", sa.String),
    _column("predicted_start_us", sa.BigInteger, nullable=True),
    _column("predicted_end_us", sa.BigInteger, nullable=True),
    _column("failure_reason", sa.String),
    _column("failure_message", sa.String),
    _column("samples_trained", sa.BigInteger),
    _column("trials_stopped", sa.Integer),
    _column("fraction_done", sa.Double),
    _column("time_remaining_us", sa.BigInteger, nullable=True),
    _column("node_id", sa.String),
    _column("epoch", sa.BigInteger),
    _column("reported_sequence", sa.BigInteger),
    _column("last_event_sequence", sa.BigInteger),
    _column("earliest_event_sequence", sa.BigInteger),
    # The same request_id gives the same task, for ever.
    sa.UniqueConstraint("tenant", "request_id", name="tasks_request"),
    sa.Index("tasks_by_tenant", "tenant", "create_us", "task_id"),
    sa.Index("tasks_by_state", "state"),
)

task_labels = sa.Table(
    "task_labels",
    metadata,
    _column("task_id", sa.String, primary_key=True),
    _column("key", sa.String, primary_key=True),
    _column("value", sa.String),
    sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name="task_labels_task"),
    sa.Index("task_labels_by_value", "key", "value"),
)

trials = sa.Table(
    "trials",
    metadata,
    _column("task_id", sa.String, primary_key=True),
    _column("trial_id", sa.String, primary_key=True),
    _column("position", sa.Integer),
    _column("config", sa.LargeBinary),
    _column("total_steps", sa.BigInteger),
    _column("state", sa.Integer),
    _column("state_epoch", sa.BigInteger),
    _column("state_step", sa.BigInteger),
    _column("step", sa.BigInteger),
    _column("train_step", sa.BigInteger),
    _column("validation_step", sa.BigInteger),
    _column("train_loss_smoothed", sa.Double, nullable=True),
    _column("validation_loss", sa.Double, nullable=True),
    _column("best_validation_loss", sa.Double, nullable=True),
    _column("best_step", sa.BigInteger),
    _column("decision", sa.LargeBinary, nullable=True),
    _column("failure_reason", sa.String),
    _column("failure_message", sa.String),
    _column("adapter", sa.LargeBinary, nullable=True),
    _column("adapter_loss", sa.Double, nullable=True),
    _column("adapter_folder", sa.String),
    _column("samples_trained", sa.BigInteger),
    _column("stop_requested", sa.Boolean),
    sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name="trials_task"),
    sa.UniqueConstraint("task_id", "position", name="trials_position"),
)

metrics = sa.Table(
    "metrics",
    metadata,
    _column("task_id", sa.String, primary_key=True),
    _column("trial_id", sa.String, primary_key=True),
    _column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    _column("time_us", sa.BigInteger),
    _column("train_loss", sa.Double, nullable=True),
    _column("train_loss_smoothed", sa.Double, nullable=True),
    _column("validation_loss", sa.Double, nullable=True),
    _column("learning_rate", sa.Double, nullable=True),
    sa.ForeignKeyConstraint(["task_id", "trial_id"], ["trials.task_id", "trials.trial_id"], name="metrics_trial"),
)

events = sa.Table(
    "events",
    metadata,
    _column("task_id", sa.String, primary_key=True),
    # Allocated under the task's row lock: a global serial is not ordered by commit.
    _column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    _column("content", sa.LargeBinary),
    sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name="events_task"),
)

outbox = sa.Table(
    "outbox",
    metadata,
    _column("outbox_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
    _column("task_id", sa.String),
    _column("kind", sa.String),
    _column("content", sa.LargeBinary),
    _column("attempts", sa.Integer),
    _column("due_us", sa.BigInteger),
    sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name="outbox_task"),
    sa.Index("outbox_by_task", "task_id", "outbox_id"),
)

datasets = sa.Table(
    "datasets",
    metadata,
    _column("dataset_id", sa.String, primary_key=True),
    _column("tenant", sa.String),
    _column("display_name", sa.String),
    _column("format", sa.Integer),
    _column("row_count", sa.BigInteger),
    _column("size_bytes", sa.BigInteger),
    _column("sha256", sa.String),
    _column("duplicate_count", sa.BigInteger),
    _column("create_us", sa.BigInteger),
    _column("path", sa.String),
    sa.Index("datasets_by_tenant", "tenant", "create_us", "dataset_id"),
)

uploads = sa.Table(
    "uploads",
    metadata,
    _column("tenant", sa.String, primary_key=True),
    _column("request_id", sa.String, primary_key=True),
    _column("request_hash", sa.String),
    _column("dataset_id", sa.String),
    _column("complete", sa.Boolean),
    _column("create_us", sa.BigInteger),
    _column("size_bytes", sa.BigInteger),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    _column("key_id", sa.String, primary_key=True),
    # SHA-256 of the key: the key itself is shown once, when it is made.
    _column("key_sha256", sa.String, unique=True),
    _column("tenant", sa.String),
    _column("scopes", sa.String),
    _column("create_us", sa.BigInteger),
    _column("expire_us", sa.BigInteger, nullable=True),
    _column("revoked", sa.Boolean),
)
