"""AdmissionService on the wire: requests in, responses out, no logic. The tenant is always the caller's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import admission_service_pb2_grpc, tuning_pb2
from alto_common.errors import invalid_fields, unavailable
from alto_common.rpc.authentication import current_caller
from alto_common.violations import Violation

from alto_admission.adapters import Adapters
from alto_admission.domain.task_states import Request
from alto_admission.domain.tokens import page_key, page_token
from alto_admission.models import Models
from alto_admission.placement_client import PlacementClient
from alto_admission.plan_watcher import PlanWatcher
from alto_admission.store.datasets import DatasetStore
from alto_admission.store.tasks import TaskFilter, TaskStore
from alto_admission.tuning_tasks import TuningTasks
from alto_admission.uploads import Chunk, Uploads
from alto_admission.watch import Watches
from alto_admission.wire import (
    base_model_to_wire,
    dataset_to_wire,
    metric_to_wire,
    task_to_wire,
    trial_to_wire,
    usage_to_wire,
)

Context = grpc.aio.ServicerContext[Any, Any]

TASKS_A_PAGE = 50
TRIALS_A_PAGE = 100
METRICS_A_PAGE = 1000
DATASETS_A_PAGE = 50
# Of texts and messages in a page, which may so have fewer tasks or trials than were asked for. A response may have
# 4 MiB; what else a thousand of them hold takes far less than the rest.
PAGE_BYTES = 3 << 20


def tenant() -> str:
    """Return whose call this is: from the credential, never from the message."""
    return current_caller.get().tenant


class AdmissionServicer(admission_service_pb2_grpc.AdmissionServiceServicer):
    """Speaks the contract for the parts that do the work."""

    def __init__(
        self,
        tuning_tasks: TuningTasks,
        tasks: TaskStore,
        datasets: DatasetStore,
        uploads: Uploads,
        adapters: Adapters,
        models: Models,
        watches: Watches,
        placement: PlacementClient,
        plan_watcher: PlanWatcher,
    ) -> None:
        self._tuning_tasks = tuning_tasks
        self._tasks = tasks
        self._datasets = datasets
        self._uploads = uploads
        self._adapters = adapters
        self._models = models
        self._watches = watches
        self._placement = placement
        self._plan_watcher = plan_watcher

    async def CreateTuningTask(
        self, request: messages.CreateTuningTaskRequest, context: Context
    ) -> messages.CreateTuningTaskResponse:
        """Admit a task."""
        task = await self._tuning_tasks.create(tenant(), request.request_id, request.spec, request.validate_only)
        return messages.CreateTuningTaskResponse(task=task_to_wire(task))

    async def GetTuningTask(
        self, request: messages.GetTuningTaskRequest, context: Context
    ) -> messages.GetTuningTaskResponse:
        """Return one task, with what the latest plan expects of it."""
        task = await self._tasks.get(request.task_id, tenant())
        return messages.GetTuningTaskResponse(task=task_to_wire(task, self._plan_watcher.forecast(task)))

    async def ListTuningTasks(
        self, request: messages.ListTuningTasksRequest, context: Context
    ) -> messages.ListTuningTasksResponse:
        """List the tenant's tasks, newest first."""
        wanted = TaskFilter(tuple(sorted(set(request.states))), tuple(sorted(request.labels.items())))
        binding = repr(("tasks", tenant(), wanted)).encode()
        key = page_key(request.page_token, binding, (int, str))
        size = request.page_size or TASKS_A_PAGE
        tasks, more = await self._tasks.page(tenant(), wanted, key, size, PAGE_BYTES)
        response = messages.ListTuningTasksResponse(tasks=map(task_to_wire, tasks))
        if more:
            response.next_page_token = page_token(binding, (tasks[-1].create_us, tasks[-1].task_id))
        return response

    async def CancelTuningTask(
        self, request: messages.CancelTuningTaskRequest, context: Context
    ) -> messages.CancelTuningTaskResponse:
        """End a task."""
        task = await self._tuning_tasks.request(tenant(), request.task_id, Request.CANCEL, request.etag)
        return messages.CancelTuningTaskResponse(task=task_to_wire(task))

    async def PauseTuningTask(
        self, request: messages.PauseTuningTaskRequest, context: Context
    ) -> messages.PauseTuningTaskResponse:
        """Free a task's resources at its next checkpoint."""
        task = await self._tuning_tasks.request(tenant(), request.task_id, Request.PAUSE, request.etag)
        return messages.PauseTuningTaskResponse(task=task_to_wire(task))

    async def ResumeTuningTask(
        self, request: messages.ResumeTuningTaskRequest, context: Context
    ) -> messages.ResumeTuningTaskResponse:
        """Queue a paused task again."""
        task = await self._tuning_tasks.request(tenant(), request.task_id, Request.RESUME, request.etag)
        return messages.ResumeTuningTaskResponse(task=task_to_wire(task))

    async def WatchTuningTask(
        self, request: messages.WatchTuningTaskRequest, context: Context
    ) -> AsyncIterator[messages.WatchTuningTaskResponse]:
        """Stream a snapshot, then each event."""
        async for message in self._watches.watch(request.task_id, tenant(), request.resume_token):
            yield message

    async def EstimateTuningTask(
        self, request: messages.EstimateTuningTaskRequest, context: Context
    ) -> messages.EstimateTuningTaskResponse:
        """Tell what a task would take."""
        checked = await self._tuning_tasks.check(tenant(), request.spec)
        size = await self._tuning_tasks.size(checked)
        resources = request.spec.resources
        try:
            estimate = await self._tuning_tasks.estimate(tenant(), request.spec, checked, size)
        except grpc.aio.AioRpcError as error:
            raise unavailable("placement cannot be reached, and only it can tell how long a task takes", 2.0) from error
        gpus = resources.gpus if resources.HasField("gpus") else 1
        return messages.EstimateTuningTaskResponse(
            trial_count=len(checked.search.trials),
            samples_planned=size.samples,
            tokens_planned=size.train_tokens,
            duration_upper=estimate.duration.upper,
            duration_expected=estimate.duration.expected,
            gpu_hours_expected=gpus * estimate.duration.expected.ToMilliseconds() / 3_600_000,
            peak_memory_bytes=await self._tuning_tasks.peak_memory_bytes(
                checked, estimate.gpu_kind or resources.gpu_kind
            ),
            basis=estimate.basis,
        )

    async def ListTrials(self, request: messages.ListTrialsRequest, context: Context) -> messages.ListTrialsResponse:
        """List a task's trials in the order of the search space."""
        await self._tasks.standing(request.task_id, tenant())
        binding = repr(("trials", request.task_id)).encode()
        key = page_key(request.page_token, binding, (int,))
        size = request.page_size or TRIALS_A_PAGE
        after = key[0] if key else -1
        trials, more = await self._tasks.page_of_trials(request.task_id, after, size, PAGE_BYTES)
        response = messages.ListTrialsResponse(trials=map(trial_to_wire, trials))
        if more:
            response.next_page_token = page_token(binding, (trials[-1].position,))
        return response

    async def GetTrial(self, request: messages.GetTrialRequest, context: Context) -> messages.GetTrialResponse:
        """Return one trial."""
        trial = await self._tasks.trial(request.task_id, request.trial_id, tenant())
        return messages.GetTrialResponse(trial=trial_to_wire(trial))

    async def ListTrialMetrics(
        self, request: messages.ListTrialMetricsRequest, context: Context
    ) -> messages.ListTrialMetricsResponse:
        """List a trial's curve in the order of its steps."""
        await self._tasks.trial(request.task_id, request.trial_id, tenant())
        binding = repr(("metrics", request.task_id, request.trial_id)).encode()
        key = page_key(request.page_token, binding, (int,))
        size = request.page_size or METRICS_A_PAGE
        points = await self._tasks.metrics(request.task_id, request.trial_id, key[0] if key else -1, size + 1)
        response = messages.ListTrialMetricsResponse(metrics=[metric_to_wire(point) for point in points[:size]])
        if len(points) > size:
            response.next_page_token = page_token(binding, (points[size - 1].step,))
        return response

    async def StopTrial(self, request: messages.StopTrialRequest, context: Context) -> messages.StopTrialResponse:
        """Stop one trial."""
        trial = await self._tuning_tasks.stop_trial(tenant(), request.task_id, request.trial_id)
        return messages.StopTrialResponse(trial=trial_to_wire(trial))

    async def UploadDataset(
        self, request_iterator: AsyncIterator[messages.UploadDatasetRequest], context: Context
    ) -> messages.UploadDatasetResponse:
        """Receive a dataset."""
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "header":
            raise invalid_fields([Violation("header", None, "send the header as the first message")])
        dataset = await self._uploads.receive(tenant(), first.header, _chunks(requests))
        return messages.UploadDatasetResponse(dataset=dataset_to_wire(dataset))

    async def GetDatasetUpload(
        self, request: messages.GetDatasetUploadRequest, context: Context
    ) -> messages.GetDatasetUploadResponse:
        """Tell where an upload carries on."""
        upload, committed, dataset = await self._uploads.kept(tenant(), request.request_id)
        return messages.GetDatasetUploadResponse(
            committed_bytes=committed,
            dataset=dataset_to_wire(dataset) if dataset else None,
            dataset_id=upload.dataset_id,
        )

    async def GetDataset(self, request: messages.GetDatasetRequest, context: Context) -> messages.GetDatasetResponse:
        """Return one dataset."""
        dataset = await self._datasets.get(request.dataset_id, tenant())
        return messages.GetDatasetResponse(dataset=dataset_to_wire(dataset))

    async def ListDatasets(
        self, request: messages.ListDatasetsRequest, context: Context
    ) -> messages.ListDatasetsResponse:
        """List the tenant's datasets, newest first, with what they take of its quota."""
        binding = repr(("datasets", tenant())).encode()
        key = page_key(request.page_token, binding, (int, str))
        size = request.page_size or DATASETS_A_PAGE
        datasets = await self._datasets.page(tenant(), key, size + 1)
        response = messages.ListDatasetsResponse(
            datasets=map(dataset_to_wire, datasets[:size]), usage=usage_to_wire(await self._uploads.usage(tenant()))
        )
        if len(datasets) > size:
            last = datasets[size - 1]
            response.next_page_token = page_token(binding, (last.create_us, last.dataset_id))
        return response

    async def DeleteDataset(
        self, request: messages.DeleteDatasetRequest, context: Context
    ) -> messages.DeleteDatasetResponse:
        """Delete a dataset that no unfinished task uses, or give up the unfinished upload of it."""
        await self._uploads.delete(tenant(), request.dataset_id)
        return messages.DeleteDatasetResponse()

    async def ListBaseModels(
        self, request: messages.ListBaseModelsRequest, context: Context
    ) -> messages.ListBaseModelsResponse:
        """List the base models that are there without a download."""
        models = [base_model_to_wire(name, facts) for name, facts in await self._models.all()]
        return messages.ListBaseModelsResponse(base_models=models)

    async def DownloadAdapter(
        self, request: messages.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[messages.DownloadAdapterResponse]:
        """Stream an adapter's files."""
        trial = await self._adapters.find(tenant(), request.task_id, request.trial_id)
        pieces = self._adapters.read(trial, request.offset)
        adapter = tuning_pb2.Adapter.FromString(trial.adapter or b"")
        header = messages.AdapterHeader(trial_id=trial.trial_id, adapter=adapter)
        yield messages.DownloadAdapterResponse(header=header)
        async for offset, data in pieces:
            yield messages.DownloadAdapterResponse(chunk=messages.AdapterChunk(offset=offset, data=data))


async def _chunks(requests: AsyncIterator[messages.UploadDatasetRequest]) -> AsyncIterator[Chunk]:
    async for request in requests:
        if request.WhichOneof("message") != "chunk":
            raise invalid_fields([Violation("header", None, "send the header once, then only chunks")])
        yield request.chunk
