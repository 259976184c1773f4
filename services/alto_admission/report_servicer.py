"""ReportService on the wire: takes a node's events in batches, each kept whole in one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
from alto.v1 import report_service_pb2, report_service_pb2_grpc
from alto_common.errors import invalid_fields
from alto_common.violations import Violation

from alto_admission.domain import fence
from alto_admission.domain.task import Task
from alto_admission.store.tasks import TaskStore

BATCH = 500
# How long a started batch waits for more events of a stream that stays open.
LINGER_S = 0.02
MAX_SIGNED = 2**63 - 1

Context = grpc.aio.ServicerContext[Any, Any]
Reported = report_service_pb2.ReportEventsRequest


class ReportServicer(report_service_pb2_grpc.ReportServiceServicer):
    """Takes reports. Each event counts once; those of a superseded assignment are refused."""

    def __init__(self, tasks: TaskStore) -> None:
        self._tasks = tasks

    async def ReportEvents(
        self, request_iterator: AsyncIterator[Reported], context: Context
    ) -> report_service_pb2.ReportEventsResponse:
        """Keep the events of one assignment; return the last that is kept.

        Raises EPOCH_STALE, RESOURCE_NOT_FOUND for an unknown task, INVALID_FIELD for events out of order. What came in
        batches before a failure is kept.
        """
        acknowledged = 0
        first: Reported | None = None
        async for batch in _batches(request_iterator):
            first = first or batch[0]
            for request in batch:
                _check(request, first)
            acknowledged = await self._keep(batch)
        return report_service_pb2.ReportEventsResponse(acknowledged_sequence=acknowledged)

    async def _keep(self, batch: list[Reported]) -> int:
        async with self._tasks.story(batch[0].task_id) as story:
            for request in batch:
                if fence.admit(story.task, request.epoch, request.sequence):
                    _check_adapter(request, story.task)
                    story.reported(request.epoch, request.event)
        return story.task.reported_sequence


def _check(request: Reported, first: Reported) -> None:
    if (request.task_id, request.epoch) != (first.task_id, first.epoch):
        cure = f"report one assignment a call: this one began with {first.task_id}, epoch {first.epoch}"
        raise invalid_fields([Violation("task_id", f"{request.task_id}, epoch {request.epoch}", cure)])
    if max(request.epoch, request.sequence) > MAX_SIGNED:
        raise invalid_fields([Violation("epoch", request.epoch, f"give at most {MAX_SIGNED}")])


def _check_adapter(request: Reported, task: Task) -> None:
    """Refuse an adapter outside the task's own folder: its files are handed out to the task's tenant."""
    if not request.event.HasField("adapter_ready"):
        return
    ready = request.event.adapter_ready
    names = [file.name for file in ready.adapter.files]
    inside = ready.uri.startswith(f"{task.artifact_folder}/") and ".." not in ready.uri.split("/")
    if not inside or not all(name and "/" not in name and name not in (".", "..") for name in names):
        cure = f"give a folder below {task.artifact_folder}, and plain file names"
        raise invalid_fields([Violation("event.adapter_ready", f"{ready.uri}: {names}", cure)])


async def _batches(requests: AsyncIterator[Reported]) -> AsyncIterator[list[Reported]]:
    """Yield events in batches: what has come, without waiting for the end of a stream that stays open."""
    iterator = aiter(requests)
    pending: asyncio.Task[Reported | None] | None = None
    batch: list[Reported] = []
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(iterator))
            await asyncio.wait([pending], timeout=LINGER_S if batch else None)
            if pending.done():
                request = pending.result()
                pending = None
                if request is None:
                    break
                batch.append(request)
                if len(batch) < BATCH:
                    continue
            yield batch
            batch = []
        if batch:
            yield batch
    finally:
        if pending is not None:
            pending.cancel()
            with suppress(asyncio.CancelledError):
                await pending


async def _next(iterator: AsyncIterator[Reported]) -> Reported | None:
    return await anext(iterator, None)
