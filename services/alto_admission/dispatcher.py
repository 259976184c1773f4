"""Delivers what placement must hear from the outbox: in order for each task, at least once, over restarts of either."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc
import structlog
from alto.v1 import error_pb2, placement_service_pb2, tuning_pb2
from alto_common.errors import DomainError, reason_name
from alto_common.rpc.status import reason_in

from alto_admission.domain import placement_news
from alto_admission.domain.story import DeliveryKind
from alto_admission.placement_client import PlacementClient, tuning_work, work_size
from alto_admission.store.outbox import Outbox, PendingDelivery
from alto_admission.store.tasks import TaskStore
from alto_admission.tuning_tasks import TuningTasks

AT_ONCE = 16
# Another dispatcher takes a delivery over when this one has not come back to it.
CLAIM_US = 60_000_000
FIRST_BACKOFF_US = 250_000
LAST_BACKOFF_US = 15_000_000
RETRY_S = 1.0
IDLE_S = 5.0

log = structlog.get_logger("alto.admission.dispatcher")


class Dispatcher:
    """The loop that empties the outbox."""

    def __init__(
        self,
        outbox: Outbox,
        tasks: TaskStore,
        tuning_tasks: TuningTasks,
        placement: PlacementClient,
        clock_us: Callable[[], int],
    ) -> None:
        self._outbox = outbox
        self._tasks = tasks
        self._tuning_tasks = tuning_tasks
        self._placement = placement
        self._clock_us = clock_us
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Tell that something was put into the outbox."""
        self._news.set()

    async def run(self) -> None:
        """Deliver for ever."""
        while True:
            self._news.clear()
            try:
                delivered = await self._round()
                wait_s = 0.0 if delivered else await self._idle_s()
            except Exception:
                log.exception("cannot read the outbox")
                wait_s = 1.0
            if wait_s > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._news.wait()

    async def _round(self) -> bool:
        due = await self._outbox.due(self._clock_us(), AT_ONCE)
        # All to the end: what a delivery has claimed, only itself can settle.
        outcomes = await asyncio.gather(*(self._deliver(delivery) for delivery in due), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        return bool(due)

    async def _idle_s(self) -> float:
        next_us = await self._outbox.next_due_us()
        if next_us is None:
            return IDLE_S
        return min(IDLE_S, max(0.01, (next_us - self._clock_us()) / 1e6))

    async def _deliver(self, delivery: PendingDelivery) -> None:
        claimed = await self._outbox.claim(delivery, self._clock_us() + CLAIM_US)
        if claimed is None:
            return
        bound = log.bind(task_id=claimed.task_id, kind=claimed.kind.value, attempt=claimed.attempts)
        try:
            await self._send(claimed)
        except Exception as error:
            expected = isinstance(error, grpc.aio.AioRpcError | DomainError)
            bound.warning("not delivered yet", error=_sentence(error), exc_info=None if expected else error)
            again_us = self._clock_us() + min(LAST_BACKOFF_US, FIRST_BACKOFF_US << min(delivery.attempts, 10))
            await self._settle(lambda: self._outbox.retry_at(claimed, again_us), claimed)
        else:
            await self._settle(lambda: self._outbox.delivered(claimed), claimed)
            bound.info("delivered")

    async def _settle(self, write: Callable[[], Awaitable[None]], claimed: PendingDelivery) -> None:
        """Write what came of a delivery: if need be when the database is back, where the claim lasts until then."""
        while True:
            try:
                return await write()
            except DomainError:
                if self._clock_us() >= claimed.due_us:
                    raise
            await asyncio.sleep(RETRY_S)

    async def _send(self, delivery: PendingDelivery) -> None:
        match delivery.kind:
            case DeliveryKind.ENQUEUE:
                await self._enqueue(delivery.task_id)
            case DeliveryKind.DEQUEUE:
                await self._placement.dequeue(delivery.task_id)
            case DeliveryKind.UPDATE:
                update = placement_service_pb2.UpdateTaskRequest.FromString(delivery.content)
                try:
                    await self._placement.update(update)
                except grpc.aio.AioRpcError as error:
                    if reason_in(error) != reason_name(error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND):
                        raise
                    # Placement has lost its state: give it the task again, then the update.
                    if await self._enqueue(delivery.task_id):
                        await self._placement.update(update)

    async def _enqueue(self, task_id: str) -> bool:
        """Hand a task over; return False when it has ended, or fails since placement will never take it."""
        task = await self._tasks.get(task_id)
        if task.ended:
            return False
        spec = tuning_pb2.TuningTaskSpec.FromString(task.spec)
        trials = await self._tasks.trials(task_id)
        try:
            checked = await self._tuning_tasks.check(task.tenant, spec, trials)
            size = await self._tuning_tasks.size(checked)
        except DomainError as error:
            if error.reason == error_pb2.ERROR_REASON_UNAVAILABLE:
                raise
            return await self._undeliverable(task_id, reason_name(error.reason), error.message)
        request = placement_service_pb2.EnqueueTaskRequest(
            tenant=task.tenant,
            work=tuning_work(task, trials, checked.train, checked.validation),
            resources=spec.resources,
            priority=spec.priority,
            size=work_size(size, checked.search.trials, checked.model.facts),
        )
        try:
            planned = await self._placement.enqueue(request)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise
            reason = reason_in(error) or reason_name(error_pb2.ERROR_REASON_TASK_UNPLACEABLE)
            return await self._undeliverable(task_id, reason, error.details() or "")
        async with self._tasks.story(task_id) as story:
            placement_news.answered(story, planned)
        return True

    async def _undeliverable(self, task_id: str, reason: str, message: str) -> bool:
        log.warning("placement cannot take the task", task_id=task_id, failure=message)
        async with self._tasks.story(task_id) as story:
            story.failed(tuning_pb2.Failure(reason=reason, message=message))
        return False


def _sentence(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
