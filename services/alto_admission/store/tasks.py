"""Tasks, trials, curves and events: reading them, and changing a task under its row lock."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import sqlalchemy as sa
from alto.v1 import error_pb2, event_pb2, tuning_pb2
from alto_common.database import Database
from alto_common.errors import DomainError, not_found
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from alto_admission.domain.story import Story
from alto_admission.domain.task import Metric, Standing, Task, Trial
from alto_admission.domain.task_states import TERMINAL, State
from alto_admission.store.schema import datasets, events, metrics, outbox, task_labels, tasks, trials

_TRIAL_STATE = [
    field.name for field in fields(Trial) if field.name not in ("task_id", "trial_id", "position", "config")
]
# In the order of their fields: a task may have thousands, and most of what reading one costs would be its names.
_TRIALS = sa.select(*(trials.c[field.name] for field in fields(Trial)))
_STANDING = sa.select(*(tasks.c[field.name] for field in fields(Standing)))


@dataclass(frozen=True)
class TaskFilter:
    """Which of a tenant's tasks to list; empty means all."""

    states: tuple[State, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


class TaskStore:
    """Keeps tasks. `on_change(task_id, last_event_sequence)` is called after each commit that added events or
    deliveries, `on_events` with the events.

    Of each task about the last `events_kept` events are kept, so that a task of many trials cannot fill the disk.
    """

    def __init__(
        self,
        database: Database,
        clock_us: Callable[[], int],
        on_change: Callable[[str, int], None],
        events_kept: int,
        on_events: Callable[[Sequence[event_pb2.TaskEvent]], None] = lambda events: None,
    ) -> None:
        self._database = database
        self._clock_us = clock_us
        self._on_change = on_change
        self._on_events = on_events
        self._events_kept = events_kept

    async def create(self, story: Story, labels: Mapping[str, str], most_unfinished: int | None = None) -> bool:
        """Keep a new task with its trials, labels, first events and deliveries, all or nothing.

        Returns False, keeping nothing, when its request_id is taken. Raises RESOURCE_NOT_FOUND when a dataset of it
        has been deleted meanwhile, and QUOTA_EXCEEDED when its tenant has `most_unfinished`, however many come at once.
        """
        task = story.task
        try:
            async with self._database.transaction() as connection:
                if most_unfinished is not None and not await self._has_room(connection, task, most_unfinished):
                    return False
                await _lock_datasets(connection, task)
                await connection.execute(tasks.insert().values(**asdict(task)))
                await connection.execute(trials.insert(), [asdict(trial) for trial in story.trials.values()])
                if labels:
                    rows = [{"task_id": task.task_id, "key": key, "value": value} for key, value in labels.items()]
                    await connection.execute(task_labels.insert(), rows)
                await self._add(connection, story)
        except IntegrityError:
            # Only another call with the same request_id can have come first: every other key is fresh.
            if await self.by_request(task.tenant, task.request_id) is None:
                raise
            return False
        self._on_change(task.task_id, task.last_event_sequence)
        return True

    async def _has_room(self, connection: AsyncConnection, task: Task, most_unfinished: int) -> bool:
        """Return whether the task may be added; False when its request_id is taken. Raises QUOTA_EXCEEDED."""
        await self._database.lock(connection, f"tasks of {task.tenant}")
        mine = tasks.c.tenant == task.tenant
        counted = sa.select(sa.func.count()).where(mine, tasks.c.state.not_in(TERMINAL))
        unfinished = (await connection.execute(counted)).scalar_one()
        if unfinished < most_unfinished:
            return True
        known = sa.select(tasks.c.task_id).where(mine, tasks.c.request_id == task.request_id)
        if (await connection.execute(known)).first() is not None:
            return False
        limit = f"{most_unfinished} tasks at a time"
        raise DomainError(
            error_pb2.ERROR_REASON_QUOTA_EXCEEDED,
            f"{unfinished} tasks have not ended; the quota is {limit}",
            quota=(f"tenant:{task.tenant}", limit),
        )

    async def by_request(self, tenant: str, request_id: str) -> Task | None:
        """Return the task that a request_id made."""
        wanted = sa.select(tasks).where(tasks.c.tenant == tenant, tasks.c.request_id == request_id)
        async with self._database.snapshot() as connection:
            row = (await connection.execute(wanted)).first()
        return None if row is None else _task(row)

    async def get(self, task_id: str, tenant: str | None = None) -> Task:
        """Return a task; raise RESOURCE_NOT_FOUND for one that is not there, or not this tenant's."""
        async with self._database.snapshot() as connection:
            return await _get(connection, task_id, tenant)

    async def standing(self, task_id: str, tenant: str) -> Standing:
        """Return how a task stands; raise RESOURCE_NOT_FOUND for one that is not there, or not this tenant's."""
        async with self._database.snapshot() as connection:
            return await _standing(connection, task_id, tenant)

    async def with_trials(self, task_id: str, tenant: str) -> tuple[Task, list[Trial]]:
        """Return a task and its trials as they were at one moment."""
        async with self._database.snapshot() as connection:
            connection = await self._repeatable(connection)
            task = await _get(connection, task_id, tenant)
            return task, await _trials(connection, task_id)

    async def page(
        self, tenant: str, wanted: TaskFilter, after: tuple[int, str] | None, size: int, most_bytes: int
    ) -> tuple[list[Task], bool]:
        """Return a tenant's tasks, newest first, from behind (create_us, task_id) `after` on, and whether more follow.

        There are at most `size` of them, fewer where `most_bytes` are full; one at least, if there is one.
        """
        query = sa.select(tasks).where(tasks.c.tenant == tenant)
        if wanted.states:
            query = query.where(tasks.c.state.in_(wanted.states))
        for key, value in wanted.labels:
            label = sa.select(task_labels).where(
                task_labels.c.task_id == tasks.c.task_id, task_labels.c.key == key, task_labels.c.value == value
            )
            query = query.where(label.exists())
        if after is not None:
            query = query.where(sa.tuple_(tasks.c.create_us, tasks.c.task_id) < sa.tuple_(*map(sa.literal, after)))
        query = query.order_by(tasks.c.create_us.desc(), tasks.c.task_id.desc())
        rows, more = await self._page(query, _content_bytes(tasks, self._database.is_sqlite), size, most_bytes)
        return [_task(row) for row in rows], more

    async def unfinished(self) -> list[Standing]:
        """Return how every task stands that has not ended."""
        async with self._database.snapshot() as connection:
            rows = await connection.execute(_STANDING.where(tasks.c.state.not_in(TERMINAL)))
            return [Standing(**row._mapping) for row in rows]

    async def count_by_state(self) -> list[tuple[State, int, int]]:
        """Return, for each state of unfinished tasks, how many are in it, and when the first was created (us)."""
        query = (
            sa.select(tasks.c.state, sa.func.count(), sa.func.min(tasks.c.create_us))
            .where(tasks.c.state.not_in(TERMINAL))
            .group_by(tasks.c.state)
        )
        async with self._database.snapshot() as connection:
            return [(state, count, first_us) for state, count, first_us in await connection.execute(query)]

    async def trial(self, task_id: str, trial_id: str, tenant: str) -> Trial:
        """Return a trial; raise RESOURCE_NOT_FOUND for one that is not there, or whose task is not this tenant's."""
        query = _TRIALS.where(trials.c.task_id == task_id, trials.c.trial_id == trial_id)
        async with self._database.snapshot() as connection:
            await _standing(connection, task_id, tenant)
            row = (await connection.execute(query)).first()
        if row is None:
            raise not_found("trial", trial_id)
        return _trial(row)

    async def trials(self, task_id: str) -> list[Trial]:
        """Return a task's trials in the order of the search space."""
        async with self._database.snapshot() as connection:
            return await _trials(connection, task_id)

    async def page_of_trials(self, task_id: str, after: int, size: int, most_bytes: int) -> tuple[list[Trial], bool]:
        """Return a task's trials from behind position `after` on, and whether more follow; as many as in `page`."""
        query = _trials_of(task_id).where(trials.c.position > after)
        rows, more = await self._page(query, _content_bytes(trials, self._database.is_sqlite), size, most_bytes)
        return [_trial(row) for row in rows], more

    async def metrics(self, task_id: str, trial_id: str, after: int, limit: int) -> list[Metric]:
        """Return points of a trial's curves in the order of steps, from behind step `after` on."""
        names = [metrics.c[field.name] for field in fields(Metric)]
        query = (
            sa.select(*names)
            .where(metrics.c.task_id == task_id, metrics.c.trial_id == trial_id, metrics.c.step > after)
            .order_by(metrics.c.step)
            .limit(limit)
        )
        async with self._database.snapshot() as connection:
            return [Metric(**row._mapping) for row in await connection.execute(query)]

    async def events_after(self, task_id: str, sequence: int, limit: int) -> list[event_pb2.TaskEvent]:
        """Return a task's events from behind `sequence` on."""
        query = (
            sa.select(events.c.content)
            .where(events.c.task_id == task_id, events.c.sequence > sequence)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        async with self._database.snapshot() as connection:
            return [event_pb2.TaskEvent.FromString(row.content) for row in await connection.execute(query)]

    async def last_sequences(self, task_ids: Sequence[str]) -> dict[str, int]:
        """Return the number of the last event of each of these tasks."""
        query = sa.select(tasks.c.task_id, tasks.c.last_event_sequence).where(tasks.c.task_id.in_(task_ids))
        async with self._database.snapshot() as connection:
            return {row.task_id: row.last_event_sequence for row in await connection.execute(query)}

    @asynccontextmanager
    async def story(self, task_id: str, tenant: str | None = None) -> AsyncIterator[Story]:
        """Open a task's story under its row lock; what the block makes of it is kept in one transaction.

        Raises RESOURCE_NOT_FOUND. When the block raises, nothing is kept.
        """
        async with self._database.transaction() as connection:
            task = await _get(connection, task_id, tenant, lock=True)
            before = replace(task)
            trials_before = {trial.trial_id: trial for trial in await _trials(connection, task_id)}
            story = Story(task, [copy(trial) for trial in trials_before.values()], self._clock_us())
            yield story
            story.close()
            await self._add(connection, story)
            changed = [trial for trial in story.trials.values() if trial != trials_before[trial.trial_id]]
            if changed:
                await connection.execute(_UPDATE_TRIAL, [_renamed(asdict(trial)) for trial in changed])
            await _update(connection, task, before, touched=bool(changed))
        self._tell(story)

    async def queued(self, task_id: str, epoch: int, status: tuning_pb2.QueueStatus) -> None:
        """Keep why a task waits, unless it waits no more, or a later epoch has reported: a story without its trials."""
        async with self._database.transaction() as connection:
            task = await _get(connection, task_id, None, lock=True)
            before = replace(task)
            story = Story(task, (), self._clock_us())
            if epoch >= task.epoch:
                story.queued(status)
            await self._add(connection, story)
            await _update(connection, task, before)
        self._tell(story)

    def _tell(self, story: Story) -> None:
        if story.events or story.deliveries:
            self._on_events(story.events)
            self._on_change(story.task.task_id, story.task.last_event_sequence)

    async def _add(self, connection: AsyncConnection, story: Story) -> None:
        task = story.task
        if story.events:
            rows = [
                {"task_id": task.task_id, "sequence": event.sequence, "content": event.SerializeToString()}
                for event in story.events
            ]
            await connection.execute(events.insert(), rows)
        if story.metrics:
            await self._upsert_metrics(connection, task.task_id, story.metrics)
        if story.deliveries:
            rows = [
                {"task_id": task.task_id, "kind": one.kind, "content": one.content, "attempts": 0, "due_us": 0}
                for one in story.deliveries
            ]
            await connection.execute(outbox.insert(), rows)
        # Trimmed in strides, so that not every report deletes.
        if task.last_event_sequence - task.earliest_event_sequence >= self._events_kept * 5 // 4:
            task.earliest_event_sequence = task.last_event_sequence - self._events_kept + 1
            old = sa.and_(events.c.task_id == task.task_id, events.c.sequence < task.earliest_event_sequence)
            await connection.execute(events.delete().where(old))

    async def _upsert_metrics(self, connection: AsyncConnection, task_id: str, points: Sequence[Metric]) -> None:
        insert = sqlite.insert(metrics) if self._database.is_sqlite else postgresql.insert(metrics)
        # A step's training and its evaluation are told separately: what one leaves out, the other keeps.
        values = {
            name: sa.func.coalesce(insert.excluded[name], metrics.c[name])
            for name in ("time_us", "train_loss", "train_loss_smoothed", "validation_loss", "learning_rate")
        }
        upsert = insert.on_conflict_do_update(index_elements=["task_id", "trial_id", "step"], set_=values)
        await connection.execute(upsert, [{"task_id": task_id, **asdict(point)} for point in points])

    async def _page(
        self, query: sa.Select[Any], row_bytes: sa.ColumnElement[int], size: int, most_bytes: int
    ) -> tuple[Sequence[sa.Row[Any]], bool]:
        """Return the first rows of an ordered query, and whether more follow.

        Only what fits is read: how long each row is the database tells without them.
        """
        async with self._database.snapshot() as connection:
            connection = await self._repeatable(connection)
            lengths = (await connection.execute(query.with_only_columns(row_bytes).limit(size + 1))).scalars().all()
            sums = itertools.accumulate(lengths[:size])
            fitting = max(1, sum(so_far <= most_bytes for so_far in sums))
            rows = (await connection.execute(query.limit(fitting))).all()
        return rows, len(lengths) > len(rows)

    async def _repeatable(self, connection: AsyncConnection) -> AsyncConnection:
        """Make all reads of a connection see one moment: SQLite's do, PostgreSQL's only when asked."""
        if self._database.is_sqlite:
            return connection
        return await connection.execution_options(isolation_level="REPEATABLE READ")


_UPDATE_TRIAL = (
    trials.update()
    .where(trials.c.task_id == sa.bindparam("of_task"), trials.c.trial_id == sa.bindparam("of_trial"))
    .values({name: sa.bindparam(f"new_{name}") for name in _TRIAL_STATE})
)


async def _update(connection: AsyncConnection, task: Task, before: Task, *, touched: bool = False) -> None:
    """Keep what has changed of a task; `touched` makes a new revision of it in any case."""
    if task != before or touched:
        task.revision += 1
        changed = {name: value for name, value in asdict(task).items() if value != getattr(before, name)}
        await connection.execute(tasks.update().where(tasks.c.task_id == task.task_id).values(changed))


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    new = {f"new_{name}": values[name] for name in _TRIAL_STATE}
    return {"of_task": values["task_id"], "of_trial": values["trial_id"], **new}


def _task(row: sa.Row[Any]) -> Task:
    return Task(**row._mapping)


def _trial(row: Sequence[Any]) -> Trial:
    return Trial(*row)


async def _get(connection: AsyncConnection, task_id: str, tenant: str | None, *, lock: bool = False) -> Task:
    query = sa.select(tasks)
    return _task(await _row(connection, query.with_for_update() if lock else query, task_id, tenant))


async def _standing(connection: AsyncConnection, task_id: str, tenant: str) -> Standing:
    return Standing(**(await _row(connection, _STANDING, task_id, tenant))._mapping)


async def _row(connection: AsyncConnection, query: sa.Select[Any], task_id: str, tenant: str | None) -> sa.Row[Any]:
    """Return what a query selects of a task; raise RESOURCE_NOT_FOUND if it is not there, or not this tenant's."""
    query = query.where(tasks.c.task_id == task_id)
    if tenant is not None:
        query = query.where(tasks.c.tenant == tenant)
    row: sa.Row[Any] | None = (await connection.execute(query)).first()
    if row is None:
        raise not_found("task", task_id)
    return row


async def _trials(connection: AsyncConnection, task_id: str) -> list[Trial]:
    return [_trial(row) for row in await connection.execute(_trials_of(task_id))]


def _trials_of(task_id: str) -> sa.Select[Any]:
    return _TRIALS.where(trials.c.task_id == task_id).order_by(trials.c.position)


def _content_bytes(table: sa.Table, is_sqlite: bool) -> sa.ColumnElement[int]:
    """Return about how many bytes a row's texts and messages have; what else it has are numbers."""
    content = [column for column in table.c if isinstance(column.type, sa.String | sa.LargeBinary)]
    lengths = (sa.func.coalesce(_bytes(column, is_sqlite), 0) for column in content)
    return functools.reduce(operator.add, lengths)


def _bytes(column: sa.Column[Any], is_sqlite: bool) -> sa.ColumnElement[int]:
    """Return how many bytes a text or a message has."""
    if not is_sqlite:
        return sa.func.octet_length(column)
    # SQLite has `octet_length` from 3.43 on, and its `length` counts a text's characters.
    return sa.func.length(sa.cast(column, sa.LargeBinary) if isinstance(column.type, sa.String) else column)


async def _lock_datasets(connection: AsyncConnection, task: Task) -> None:
    """Hold a task's datasets until the commit, so that none is deleted between the check and the task."""
    for dataset_id in filter(None, (task.dataset_id, task.validation_dataset_id)):
        query = sa.select(datasets.c.dataset_id).where(
            datasets.c.dataset_id == dataset_id, datasets.c.tenant == task.tenant
        )
        if (await connection.execute(query.with_for_update())).first() is None:
            raise not_found("dataset", dataset_id)
