"""Follows placement's plan: why tasks wait, until when, which were taken from a dead node, which were given up."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import cached_property

import grpc
import structlog
from alto.v1 import error_pb2, placement_pb2, tuning_pb2
from alto_common.errors import DomainError

from alto_admission.domain import placement_news
from alto_admission.domain.story import is_news
from alto_admission.domain.task import Standing, Task
from alto_admission.domain.task_states import QUEUED
from alto_admission.placement_client import PlacementClient
from alto_admission.store.outbox import Outbox
from alto_admission.store.tasks import TaskStore

GRACE_S = 15.0
TICK_S = 5.0
RECONNECT_S = 1.0
BETWEEN_PLANS_S = 0.1

log = structlog.get_logger("alto.admission.plan")


class _Plan:
    """What a plan says of tasks, by their ids, and which of them each tenant has."""

    def __init__(self, message: placement_pb2.Plan) -> None:
        self.tasks = {task.task_id: task for task in message.tasks}

    @cached_property
    def task_ids(self) -> Mapping[str, Collection[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for task in self.tasks.values():
            found[task.tenant].add(task.task_id)
        return found


class PlanWatcher:
    """The loop that reads plans. `grace_s` is how long a task may be missing from them before that means something."""

    def __init__(
        self,
        placement: PlacementClient,
        tasks: TaskStore,
        outbox: Outbox,
        grace_s: float = GRACE_S,
    ) -> None:
        self._placement = placement
        self._tasks = tasks
        self._outbox = outbox
        self._grace_s = grace_s
        self._tick_s = min(TICK_S, grace_s / 2)
        self._missing_since: dict[str, float] = {}
        self._plan: _Plan | None = None
        # A task that was given up is in one plan only: it must not go under when plans come faster than they are taken.
        self._given_up: dict[str, placement_pb2.PlannedTask] = {}
        self._news = asyncio.Event()

    def forecast(self, task: Task) -> tuning_pb2.TaskForecast | None:
        """Return what the newest plan expects of a task, None when there is none; tasks of others are a number."""
        plan = self._plan
        if plan is None or task.ended:
            return None
        planned = plan.tasks.get(task.task_id)
        if planned is None or not planned.HasField("forecast") or planned.epoch < task.epoch:
            return None
        return placement_news.forecast(planned, plan.task_ids[task.tenant])

    async def run(self) -> None:
        """Follow the plan for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read())
            group.create_task(self._apply())

    async def _read(self) -> None:
        """Keep the newest plan; None while placement cannot be reached."""
        while True:
            try:
                async for plan in self._placement.plans():
                    self._plan = _Plan(plan)
                    given_up = (task for task in plan.tasks if task.state == placement_pb2.PLACEMENT_STATE_GIVEN_UP)
                    self._given_up.update({task.task_id: deepcopy(task) for task in given_up})  # without its plan
                    self._news.set()
            except grpc.aio.AioRpcError as error:
                if self._plan is not None:
                    log.warning("placement is away", error=f"{error.code().name}: {error.details()}")
            self._plan = None
            self._news.set()
            await asyncio.sleep(RECONNECT_S)

    async def _apply(self) -> None:
        while True:
            # Plans come as things happen; what is missing from them must be noticed when nothing does.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s):
                    await self._news.wait()
            self._news.clear()
            try:
                await self.take(self._plan)
            except Exception:
                log.exception("cannot take the plan over")
            await asyncio.sleep(BETWEEN_PLANS_S)

    async def take(self, plan: _Plan | None) -> None:
        """Take over one plan; None when placement cannot be reached. A task whose news fails holds up no other."""
        given_up, self._given_up = self._given_up, {}
        planned = given_up | plan.tasks if plan is not None else given_up
        errors: dict[str, Exception] = {}
        left = given_up  # no later plan has them
        try:
            for task in await self._tasks.unfinished():
                try:
                    if plan is None and task.task_id not in given_up:
                        await self._unreachable(task)
                    else:
                        await self._compare(task, planned.get(task.task_id))
                except Exception as error:
                    if isinstance(error, DomainError) and error.reason == error_pb2.ERROR_REASON_UNAVAILABLE:
                        raise
                    error.add_note(f"task {task.task_id}")
                    errors[task.task_id] = error
            left = {task_id: news for task_id, news in given_up.items() if task_id in errors}
        finally:
            self._given_up = left | self._given_up
        if errors:
            raise ExceptionGroup("what the plan says of some tasks", list(errors.values()))

    async def _unreachable(self, task: Standing) -> None:
        self._missing_since.pop(task.task_id, None)
        if task.state == QUEUED and is_news(task, placement_news.UNREACHABLE):
            await self._tasks.queued(task.task_id, task.epoch, placement_news.UNREACHABLE)

    async def _compare(self, task: Standing, planned: placement_pb2.PlannedTask | None) -> None:
        if not placement_news.is_forgotten(task, planned):
            self._missing_since.pop(task.task_id, None)
            if planned is not None and placement_news.concerns(task, planned):
                await self._take_over(task, planned)
        elif await self._outbox.holds(task.task_id):
            self._missing_since.pop(task.task_id, None)
        else:
            since = self._missing_since.setdefault(task.task_id, time.monotonic())
            if time.monotonic() - since >= self._grace_s:
                del self._missing_since[task.task_id]
                log.warning("placement does not know the task", task_id=task.task_id)
                async with self._tasks.story(task.task_id) as story:
                    placement_news.recover(story)

    async def _take_over(self, task: Standing, planned: placement_pb2.PlannedTask) -> None:
        if task.state == QUEUED and (status := placement_news.queue_status(planned)) is not None:
            await self._tasks.queued(task.task_id, planned.epoch, status)
        else:
            async with self._tasks.story(task.task_id) as story:
                placement_news.apply(story, planned)
