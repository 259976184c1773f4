"""What tenants do with tasks: admit, cancel, pause, resume, stop a trial. Everything is checked first and kept once."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import structlog
from alto.v1 import error_pb2, placement_service_pb2, tuning_pb2
from alto_common import tuning
from alto_common.artifacts import ArtifactStore
from alto_common.errors import DomainError, invalid_fields
from alto_common.tuning_wire import trial_from_wire
from alto_common.violations import Violation

from alto_admission.domain.search import DatasetShape, Search, complete_config, plan_search
from alto_admission.domain.story import Story
from alto_admission.domain.task import Task, Trial
from alto_admission.domain.task_states import Request
from alto_admission.domain.work_size import (
    BYTES_PER_TOKEN,
    Rows,
    SearchSize,
    peak_memory_bytes,
    search_size,
)
from alto_admission.models import KnownModel, Models
from alto_admission.placement_client import PlacementClient, work_size
from alto_admission.search_wire import expanded
from alto_admission.store.datasets import Dataset, DatasetStore
from alto_admission.store.tasks import TaskStore
from alto_admission.uploads import FORMATS

# How long the tokenizer may take before the size of a dataset in bytes has to do.
TOKEN_COUNT_S = 10.0
# Of a task's specification and its trials' configurations: one message of 4 MiB tells of them and of what they came to.
MOST_BYTES = 1_500_000
_ROW_FORMATS = {wire: row_format for row_format, wire in FORMATS.items()}

log = structlog.get_logger("alto.admission")


@dataclass(frozen=True)
class CheckedSpec:
    """A request that can be trained, and what it is made of."""

    model: KnownModel
    train: Dataset
    validation: Dataset | None
    search: Search


class TuningTasks:
    """Admits tasks and carries out what tenants ask of them. Time and limits come from outside."""

    def __init__(
        self,
        tasks: TaskStore,
        datasets: DatasetStore,
        models: Models,
        artifacts: ArtifactStore,
        placement: PlacementClient,
        clock_us: Callable[[], int],
        max_trials: int,
        max_unfinished_tasks: int,
    ) -> None:
        self._tasks = tasks
        self._datasets = datasets
        self._models = models
        self._artifacts = artifacts
        self._placement = placement
        self._clock_us = clock_us
        self._max_trials = max_trials
        self._max_unfinished_tasks = max_unfinished_tasks
        self._token_lengths: dict[tuple[str, str], tuple[int, ...]] = {}

    async def create(self, tenant: str, request_id: str, spec: tuning_pb2.TuningTaskSpec, validate_only: bool) -> Task:
        """Admit a task, or return the one that this request_id admitted before (AIP-155).

        With `validate_only` nothing is kept and the task has no id. Raises REQUEST_ID_REUSED, UNKNOWN_BASE_MODEL,
        SEARCH_SPACE_INVALID, CONFIGURATION_UNFIT, INVALID_FIELD, RESOURCE_NOT_FOUND, QUOTA_EXCEEDED, TASK_UNPLACEABLE.
        """
        content = spec.SerializeToString(deterministic=True)
        request_hash = hashlib.sha256(content).hexdigest()
        known = None if validate_only else await self._tasks.by_request(tenant, request_id)
        if known is not None:
            return _same_request(known, request_hash)
        checked = await self.check(tenant, spec)
        search = checked.search
        task = Task(
            task_id="" if validate_only else _new_id("task"),
            tenant=tenant,
            request_id=request_id,
            request_hash=request_hash,
            spec=content,
            base_model=spec.base_model,
            dataset_id=spec.dataset_id,
            validation_dataset_id=spec.validation_dataset_id or None,
            trial_count=len(search.trials),
            samples_planned=sum(trial.config.total_samples(search.train_rows) for trial in search.trials),
            create_us=self._clock_us(),
            queue_reason="ENTERING_QUEUE",
            queue_explanation="the task is being handed to placement",
        )
        trials = _trials(task.task_id, search)
        _check_size(spec, trials)
        await self._check_placeable(tenant, spec, checked)
        if validate_only:
            return task
        story = Story(task, trials, task.create_us)
        story.begin()
        if await self._tasks.create(story, spec.labels, self._max_unfinished_tasks):
            return task
        known = await self._tasks.by_request(tenant, request_id)
        assert known is not None
        return _same_request(known, request_hash)

    async def check(
        self, tenant: str, spec: tuning_pb2.TuningTaskSpec, admitted: Sequence[Trial] | None = None
    ) -> CheckedSpec:
        """Return what a request asks for, once all of it has been found sound.

        Of a task that was admitted before, its own trials are taken: limits may have changed since.
        """
        train = await self._datasets.get(spec.dataset_id, tenant)
        validation = None
        if spec.validation_dataset_id:
            validation = await self._datasets.get(spec.validation_dataset_id, tenant)
        model = await self._models.get(spec.base_model)
        trials: Sequence[tuning.Trial]
        # In threads: a thousand configurations over a model of many layers take a moment.
        if admitted is None:
            trials = await asyncio.to_thread(expanded, spec.search_space, self._max_trials, model.facts.context_length)
        else:
            trials = [
                trial_from_wire(trial.trial_id, tuning_pb2.TrialConfig.FromString(trial.config)) for trial in admitted
            ]
        search = await asyncio.to_thread(
            plan_search, spec, model.facts, _shape(train), _shape(validation) if validation else None, trials
        )
        return CheckedSpec(model, train, validation, search)

    async def size(self, checked: CheckedSpec) -> SearchSize:
        """Return how much work a request is, by its tokenizer where that is quick, else by its bytes."""
        search = checked.search
        return search_size(search.trials, await self._rows(checked), search.evaluation, search.early_exit)

    async def peak_memory_bytes(self, checked: CheckedSpec, gpu_kind: str) -> int:
        """Return a first estimate of the memory that a request takes on this kind of device."""
        search, rows = checked.search, await self._rows(checked)
        return await asyncio.to_thread(
            peak_memory_bytes, search.trials, checked.model.facts, rows, search.evaluation, search.early_exit, gpu_kind
        )

    async def _rows(self, checked: CheckedSpec) -> Rows:
        lengths = await self._lengths(checked.train, checked.model)
        return Rows(checked.search.train_rows, checked.search.validation_rows, lengths)

    async def estimate(
        self, tenant: str, spec: tuning_pb2.TuningTaskSpec, checked: CheckedSpec, size: SearchSize
    ) -> placement_service_pb2.EstimateTaskResponse:
        """Return how long placement expects a request to take.

        Raises TASK_UNPLACEABLE when no node could ever hold it, grpc.aio.AioRpcError when placement cannot be reached.
        """
        wanted = placement_service_pb2.EstimateTaskRequest(
            tenant=tenant,
            base_model=spec.base_model,
            resources=spec.resources,
            size=await asyncio.to_thread(work_size, size, checked.search.trials, checked.model.facts),
        )
        return await self._placement.estimate(wanted)

    async def request(self, tenant: str, task_id: str, request: Request, etag: str) -> Task:
        """Carry out a tenant's request. Raises STATE_CONFLICT, ETAG_MISMATCH, RESOURCE_NOT_FOUND."""
        async with self._tasks.story(task_id, tenant) as story:
            if etag and etag != story.task.etag:
                raise DomainError(
                    error_pb2.ERROR_REASON_ETAG_MISMATCH,
                    f"the task has changed: its etag is {story.task.etag}, not {etag}; read it again",
                    metadata={"etag": story.task.etag},
                )
            story.request(request)
        return story.task

    async def stop_trial(self, tenant: str, task_id: str, trial_id: str) -> Trial:
        """Ask for the end of a trial. Raises RESOURCE_NOT_FOUND."""
        await self._tasks.trial(task_id, trial_id, tenant)
        async with self._tasks.story(task_id, tenant) as story:
            trial = story.trials[trial_id]
            story.stop_trial(trial)
        return trial

    async def _check_placeable(self, tenant: str, spec: tuning_pb2.TuningTaskSpec, checked: CheckedSpec) -> None:
        """Refuse at once what placement would refuse later. While it cannot be reached a task may be admitted."""
        try:
            await self.estimate(tenant, spec, checked, await self.size(checked))
        except grpc.aio.AioRpcError as error:
            log.warning("placement cannot say whether a task fits", error=f"{error.code().name}: {error.details()}")

    async def _lengths(self, dataset: Dataset, model: KnownModel) -> tuple[int, ...]:
        key = (dataset.dataset_id, model.location)
        lengths = self._token_lengths.get(key)
        if lengths is None:
            rows = self._artifacts.local_path(dataset.path)
            counted = await self._models.token_lengths(rows, model, TOKEN_COUNT_S) if rows else None
            if counted is None:
                return (dataset.size_bytes // (BYTES_PER_TOKEN * max(1, dataset.row_count)) + 1,)
            lengths = self._token_lengths[key] = counted
        return lengths


def _check_size(spec: tuning_pb2.TuningTaskSpec, trials: Sequence[Trial]) -> None:
    """Raise INVALID_FIELD for a task that a watch could not tell of in one message."""
    size_bytes = spec.ByteSize() + sum(len(trial.config) for trial in trials)
    if size_bytes > MOST_BYTES:
        cure = f"ask for less than {MOST_BYTES:,} bytes, each trial's whole configuration included: fewer at a time"
        raise invalid_fields([Violation("spec.search_space", f"{size_bytes:,} bytes", cure)])


def _same_request(task: Task, request_hash: str) -> Task:
    if task.request_hash != request_hash:
        raise DomainError(
            error_pb2.ERROR_REASON_REQUEST_ID_REUSED,
            f"this request_id admitted {task.task_id} with another specification: choose a new one",
            metadata={"task_id": task.task_id},
        )
    return task


def _trials(task_id: str, search: Search) -> list[Trial]:
    return [
        Trial(
            task_id=task_id,
            trial_id=trial.trial_id,
            position=position,
            config=complete_config(trial.config),
            total_steps=trial.config.total_steps(search.train_rows),
        )
        for position, trial in enumerate(search.trials)
    ]


def _shape(dataset: Dataset) -> DatasetShape:
    return DatasetShape(_ROW_FORMATS[dataset.format], dataset.row_count)


def _new_id(kind: str) -> str:
    """Return a fresh id; ids of later moments sort behind those of earlier ones."""
    return f"{kind}-{time.time_ns() // 1_000_000:011x}{secrets.token_hex(5)}"
