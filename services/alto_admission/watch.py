"""WatchTuningTask: a snapshot, then each event, each with the token that carries on behind it.

Nothing is buffered for a client: events are read from the database a page at a time as the client takes them. A client
that falls further behind than `max_lag` events gets a compaction marker and a new snapshot instead of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from alto.v1 import admission_service_pb2, error_pb2
from alto_common.errors import DomainError

from alto_admission.domain.task import Standing
from alto_admission.domain.tokens import resume_token, resumed_sequence
from alto_admission.event_hub import EventHub, Subscription
from alto_admission.store.tasks import TaskStore
from alto_admission.wire import task_to_wire, timestamp, trial_to_wire

WatchResponse = admission_service_pb2.WatchTuningTaskResponse


@dataclass(frozen=True)
class WatchSettings:
    """How a watch behaves: seconds between heartbeats, events in one read, events that a client may fall behind.

    `max_per_tenant` is how many a tenant may have open at once: each reads the database for itself.
    """

    heartbeat_s: float = 15.0
    page: int = 200
    max_lag: int = 5000
    max_per_tenant: int = 1000


class Watches:
    """Serves watches of tasks."""

    def __init__(self, tasks: TaskStore, hub: EventHub, clock_us: Callable[[], int], settings: WatchSettings) -> None:
        self._tasks = tasks
        self._hub = hub
        self._clock_us = clock_us
        self._settings = settings
        self._open: Counter[str] = Counter()

    async def watch(self, task_id: str, tenant: str, token: str) -> AsyncIterator[WatchResponse]:
        """Yield a task's messages until its last event.

        Raises RESOURCE_NOT_FOUND; RESUME_TOKEN_INVALID for another task's token; RESUME_TOKEN_TOO_OLD when events
        behind it are gone, with the earliest token that still works; QUOTA_EXCEEDED when the tenant has too many open;
        UNAVAILABLE with the last token when the server ends.
        """
        with self._counted(tenant), self._hub.watched(task_id) as news:
            async for message in self._follow(task_id, tenant, token, news):
                yield message

    @contextmanager
    def _counted(self, tenant: str) -> Iterator[None]:
        if self._open[tenant] >= self._settings.max_per_tenant:
            limit = f"{self._settings.max_per_tenant} watches at a time"
            raise DomainError(
                error_pb2.ERROR_REASON_QUOTA_EXCEEDED,
                f"{self._open[tenant]} watches are open; the quota is {limit}: end one, or share one among readers",
                quota=(f"tenant:{tenant}", limit),
            )
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]

    async def _follow(self, task_id: str, tenant: str, token: str, news: Subscription) -> AsyncIterator[WatchResponse]:
        task = await self._tasks.standing(task_id, tenant)
        if token:
            sequence = resumed_sequence(token, task_id, task.last_event_sequence)
            _check_age(task, sequence)
        else:
            snapshot, task = await self._snapshot(task_id, tenant)
            sequence = task.last_event_sequence
            yield snapshot
        while not (task.ended and sequence >= task.last_event_sequence):
            if self._hub.closed:
                raise _ending(task_id, sequence)
            behind = task.last_event_sequence - sequence
            if behind > self._settings.max_lag or sequence + 1 < task.earliest_event_sequence:
                snapshot, task = await self._snapshot(task_id, tenant)
                left_out = task.last_event_sequence - sequence
                compacted = admission_service_pb2.WatchCompacted(events_left_out=left_out)
                # With the old token: a client that breaks off here has not had the snapshot yet.
                yield WatchResponse(resume_token=resume_token(task_id, sequence), compacted=compacted)
                sequence = task.last_event_sequence
                yield snapshot
                continue
            for event in await self._tasks.events_after(task_id, sequence, self._settings.page):
                sequence = event.sequence
                yield WatchResponse(resume_token=resume_token(task_id, sequence), event=event)
            caught_up = sequence >= task.last_event_sequence
            if caught_up and not task.ended and not await news.wait_beyond(sequence, self._settings.heartbeat_s):
                beat = admission_service_pb2.WatchHeartbeat(time=timestamp(self._clock_us()))
                yield WatchResponse(resume_token=resume_token(task_id, sequence), heartbeat=beat)
            task = await self._tasks.standing(task_id, tenant)

    async def _snapshot(self, task_id: str, tenant: str) -> tuple[WatchResponse, Standing]:
        task, trials = await self._tasks.with_trials(task_id, tenant)
        snapshot = admission_service_pb2.TuningTaskSnapshot(
            task=task_to_wire(task), trials=[trial_to_wire(trial) for trial in trials]
        )
        return WatchResponse(resume_token=resume_token(task_id, task.last_event_sequence), snapshot=snapshot), task


def _check_age(task: Standing, sequence: int) -> None:
    if sequence + 1 < task.earliest_event_sequence:
        raise DomainError(
            error_pb2.ERROR_REASON_RESUME_TOKEN_TOO_OLD,
            "events behind this token are no longer kept: begin with a snapshot, or at the earliest token",
            metadata={"earliest_resume_token": resume_token(task.task_id, task.earliest_event_sequence - 1)},
        )


def _ending(task_id: str, sequence: int) -> DomainError:
    return DomainError(
        error_pb2.ERROR_REASON_UNAVAILABLE,
        "the server is shutting down: watch again with the last resume token",
        retry_after_s=1.0,
        metadata={"resume_token": resume_token(task_id, sequence)},
    )
