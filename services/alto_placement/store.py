"""All SQL of placement. One transaction keeps what one operation changed; the database itself refuses a second epoch.

Besides the rules of `lifecycle`, the schema holds two of them by itself: (task_id, epoch) is unique, and a task has at
most one assignment that has not ended. A second placement process on the same database therefore fails instead of
giving a task away twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alto_common.database import Database
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from alto_placement.state import (
    AssignmentRow,
    Changes,
    ClusterState,
    FailureCause,
    NodeRow,
    NodeSpec,
    Outcome,
    StopReason,
    TaskRow,
    TaskState,
    WorkSize,
)

MIGRATIONS = Path(__file__).parent / "migrations"

metadata = sa.MetaData()

nodes = sa.Table(
    "nodes",
    metadata,
    sa.Column("node_id", sa.String(128), primary_key=True),
    sa.Column("incarnation", sa.String(64), nullable=False),
    sa.Column("gpu_kind", sa.String(64), nullable=False),
    sa.Column("gpus", sa.Integer, nullable=False),
    sa.Column("memory_bytes_per_gpu", sa.BigInteger, nullable=False),
    sa.Column("address", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("cordoned", sa.Boolean, nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False),
    sa.Column("leaving", sa.Boolean, nullable=False),
    sa.Column("lost", sa.Boolean, nullable=False),
    sa.Column("last_seen_s", sa.Double, nullable=False),
    sa.Column("superseded", sa.JSON, nullable=False),
)

tasks = sa.Table(
    "tasks",
    metadata,
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
    sa.Column("ran_on", sa.String(128), nullable=False),
    sa.Column("keeps_turn", sa.Boolean, nullable=False),
    sa.Column("alone", sa.Boolean, nullable=False),
    sa.Column("ended", sa.String(16)),
    sa.Column("ended_s", sa.Double),
    sa.Column("failure", sa.JSON(none_as_null=True)),
    sa.Index("tasks_ended", "ended", "ended_s"),
)

assignments = sa.Table(
    "assignments",
    metadata,
    sa.Column("assignment_id", sa.String(64), primary_key=True),
    sa.Column("task_id", sa.String(64), sa.ForeignKey("tasks.task_id"), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("node_id", sa.String(128), sa.ForeignKey("nodes.node_id"), nullable=False),
    sa.Column("incarnation", sa.String(64), nullable=False),
    sa.Column("gpu_indices", sa.JSON, nullable=False),
    sa.Column("host_assignment_id", sa.String(64), nullable=False),
    sa.Column("started_s", sa.Double, nullable=False),
    sa.Column("stop", sa.String(16)),
    sa.Column("outcome", sa.String(24)),
    sa.Column("ended_s", sa.Double),
    sa.UniqueConstraint("task_id", "epoch", name="assignments_task_epoch"),
    sa.Index(
        "assignments_one_live",
        "task_id",
        unique=True,
        sqlite_where=sa.text("outcome IS NULL"),
        postgresql_where=sa.text("outcome IS NULL"),
    ),
)


learned = sa.Table(
    "learned",
    metadata,
    sa.Column("name", sa.String(512), primary_key=True),
    sa.Column("content", sa.JSON, nullable=False),
)


class StoreConflictError(Exception):
    """Another process has written to this database: what is in memory is out of date."""


class PlacementStore:
    """Keeps placement's rows in a database. `Database` comes with `MIGRATIONS`."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def load(self, ended_since_s: float) -> ClusterState:
        """Return all nodes, live assignments, and tasks that have not ended or ended after `ended_since_s`."""
        async with self.database.snapshot() as connection:
            node_rows = (await connection.execute(sa.select(nodes))).mappings().all()
            recent = sa.or_(tasks.c.ended.is_(None), tasks.c.ended_s >= ended_since_s)
            task_rows = (await connection.execute(sa.select(tasks).where(recent))).mappings().all()
            live = sa.select(assignments).where(assignments.c.outcome.is_(None))
            assignment_rows = (await connection.execute(live)).mappings().all()
        return ClusterState(
            nodes={row["node_id"]: _node(dict(row)) for row in node_rows},
            tasks={row["task_id"]: _task(dict(row)) for row in task_rows},
            assignments={row["assignment_id"]: _assignment(dict(row)) for row in assignment_rows},
        )

    async def task(self, task_id: str) -> TaskRow | None:
        """Return one task, however long ago it ended."""
        async with self.database.snapshot() as connection:
            found = await connection.execute(sa.select(tasks).where(tasks.c.task_id == task_id))
            row = found.mappings().one_or_none()
        return _task(dict(row)) if row is not None else None

    async def save(self, changes: Changes) -> None:
        """Keep what one operation changed, whole or not at all. Raises StoreConflictError.

        With a node that is forgotten go its assignments that have ended: they name it.
        """
        try:
            async with self.database.transaction() as connection:
                for node in changes.nodes:
                    await self._save_node(connection, node)
                for task in changes.tasks:
                    await self._save_task(connection, task, new=task.task_id in changes.new_task_ids)
                # Ends first: the place of a task's new assignment is then free.
                for row in sorted(changes.assignments, key=lambda row: row.outcome is None):
                    await self._save_assignment(connection, row, new=row.assignment_id in changes.new_assignment_ids)
                for node_id in changes.forgotten_node_ids:
                    over = sa.and_(assignments.c.node_id == node_id, assignments.c.outcome.is_not(None))
                    await connection.execute(assignments.delete().where(over))
                    await connection.execute(nodes.delete().where(nodes.c.node_id == node_id))
        except IntegrityError as error:
            raise StoreConflictError(f"the database refused a change: {error.orig}") from error

    async def load_learned(self) -> dict[str, Any]:
        """Return all that was learned, by name."""
        async with self.database.snapshot() as connection:
            rows = (await connection.execute(sa.select(learned))).mappings().all()
        return {row["name"]: row["content"] for row in rows}

    async def save_learned(self, records: Mapping[str, Any]) -> None:
        """Keep what was learned, each record in the place of the one of its name."""
        async with self.database.transaction() as connection:
            for name, content in records.items():
                mine = learned.update().where(learned.c.name == name).values(content=content)
                if (await connection.execute(mine)).rowcount == 0:
                    await connection.execute(learned.insert().values(name=name, content=content))

    async def assignments_of(self, task_id: str) -> list[AssignmentRow]:
        """Return every assignment that a task ever had on nodes that are known, by epoch."""
        query = sa.select(assignments).where(assignments.c.task_id == task_id).order_by(assignments.c.epoch)
        async with self.database.snapshot() as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [_assignment(dict(row)) for row in rows]

    async def _save_node(self, connection: AsyncConnection, node: NodeRow) -> None:
        values = {
            **asdict(node.spec),
            "incarnation": node.incarnation,
            "cordoned": node.cordoned,
            "draining": node.draining,
            "leaving": node.leaving,
            "lost": node.lost,
            "last_seen_s": node.last_seen_s,
            "superseded": list(node.superseded),
        }
        changed = await connection.execute(nodes.update().where(nodes.c.node_id == node.node_id).values(**values))
        if changed.rowcount == 0:
            await connection.execute(nodes.insert().values(**values))

    async def _save_task(self, connection: AsyncConnection, task: TaskRow, new: bool) -> None:
        values = {
            **{column.name: getattr(task, column.name) for column in tasks.columns},
            "size": asdict(task.size),
            "stopped_trial_ids": list(task.stopped_trial_ids),
            "ended": task.ended.value if task.ended is not None else None,
            "failure": asdict(task.failure) if task.failure is not None else None,
        }
        if new:
            await connection.execute(tasks.insert().values(**values))
            return
        # The store refuses to take an epoch back.
        mine = sa.and_(tasks.c.task_id == task.task_id, tasks.c.epoch <= task.epoch)
        changed = await connection.execute(tasks.update().where(mine).values(**values))
        if changed.rowcount != 1:
            raise StoreConflictError(f"task {task.task_id} has gone beyond epoch {task.epoch}")

    async def _save_assignment(self, connection: AsyncConnection, row: AssignmentRow, new: bool) -> None:
        values = {
            **{column.name: getattr(row, column.name) for column in assignments.columns},
            "gpu_indices": list(row.gpu_indices),
            "stop": row.stop.value if row.stop is not None else None,
            "outcome": row.outcome.value if row.outcome is not None else None,
        }
        if new:
            await connection.execute(assignments.insert().values(**values))
            return
        live = sa.and_(assignments.c.assignment_id == row.assignment_id, assignments.c.outcome.is_(None))
        changed = await connection.execute(assignments.update().where(live).values(**values))
        if changed.rowcount != 1:
            raise StoreConflictError(f"assignment {row.assignment_id} has already ended")


def _node(row: dict[str, Any]) -> NodeRow:
    spec = NodeSpec(**{name: row.pop(name) for name in NodeSpec.__dataclass_fields__})
    row["superseded"] = tuple(row["superseded"])
    return NodeRow(spec=spec, **row)


def _task(row: dict[str, Any]) -> TaskRow:
    row["work"] = bytes(row["work"])
    row["size"] = WorkSize(**row["size"])
    row["stopped_trial_ids"] = tuple(row["stopped_trial_ids"])
    row["ended"] = TaskState(row["ended"]) if row["ended"] is not None else None
    row["failure"] = FailureCause(**row["failure"]) if row["failure"] is not None else None
    return TaskRow(**row)


def _assignment(row: dict[str, Any]) -> AssignmentRow:
    row["gpu_indices"] = tuple(row["gpu_indices"])
    row["stop"] = StopReason(row["stop"]) if row["stop"] is not None else None
    row["outcome"] = Outcome(row["outcome"]) if row["outcome"] is not None else None
    return AssignmentRow(**row)
