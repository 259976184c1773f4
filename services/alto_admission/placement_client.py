"""Calls to placement, and what they carry."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import grpc
from alto.v1 import error_pb2, placement_pb2, placement_service_pb2, placement_service_pb2_grpc, tuning_pb2
from alto_common import tuning, tuning_wire
from alto_common.base_models import ModelFacts
from alto_common.errors import DomainError
from alto_common.rpc.channel import bearer_metadata, service_channel
from alto_common.rpc.status import info_in
from alto_common.rpc.tls import TlsFiles
from alto_common.violations import Violation

from alto_admission.domain.search import validation_fraction
from alto_admission.domain.task import Task, Trial
from alto_admission.domain.work_size import SearchSize, adapter_memory_bytes, least_memory_bytes
from alto_admission.store.datasets import Dataset

CALL_TIMEOUT_S = 10.0


class PlacementClient:
    """Placement at one address, over TLS with `tls`. Calls raise grpc.aio.AioRpcError; each can be repeated safely."""

    def __init__(self, address: str, service_token: str, tls: TlsFiles | None = None) -> None:
        self._channel = service_channel(address, tls)
        self._stub = placement_service_pb2_grpc.PlacementServiceStub(self._channel)
        self._metadata = bearer_metadata(service_token)

    async def enqueue(self, request: placement_service_pb2.EnqueueTaskRequest) -> placement_pb2.PlannedTask:
        """Queue a task and return it as planned."""
        response = await self._stub.EnqueueTask(request, metadata=self._metadata, timeout=CALL_TIMEOUT_S)
        return response.task

    async def update(self, request: placement_service_pb2.UpdateTaskRequest) -> None:
        """Hold a task back, let it go, or stop some of its trials."""
        await self._stub.UpdateTask(request, metadata=self._metadata, timeout=CALL_TIMEOUT_S)

    async def dequeue(self, task_id: str) -> None:
        """Take a task out."""
        request = placement_service_pb2.DequeueTaskRequest(task_id=task_id)
        await self._stub.DequeueTask(request, metadata=self._metadata, timeout=CALL_TIMEOUT_S)

    async def estimate(
        self, request: placement_service_pb2.EstimateTaskRequest
    ) -> placement_service_pb2.EstimateTaskResponse:
        """Return how long a task would take. Raises TASK_UNPLACEABLE when no node could ever hold it."""
        try:
            response: placement_service_pb2.EstimateTaskResponse = await self._stub.EstimateTask(
                request, metadata=self._metadata, timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise _unplaceable(error, request.resources) from error
            raise
        return response

    async def plans(self) -> AsyncIterator[placement_pb2.Plan]:
        """Yield the plan, then each new one, until the stream breaks."""
        parts = []
        async for response in self._stub.WatchPlan(placement_service_pb2.WatchPlanRequest(), metadata=self._metadata):
            parts.append(response.plan)
            if not response.continues:
                plan, *rest = parts
                for part in rest:
                    plan.MergeFrom(part)
                yield plan
                parts = []

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _unplaceable(error: grpc.aio.AioRpcError, resources: tuning_pb2.Resources) -> DomainError:
    """Return placement's refusal as the caller of the public API is to hear it."""
    info = info_in(error)
    asked = f"{resources.gpus if resources.HasField('gpus') else 1} {resources.gpu_kind}".strip()
    return DomainError(
        error_pb2.ERROR_REASON_TASK_UNPLACEABLE,
        error.details() or "no node can ever hold the task",
        violations=[Violation("spec.resources", asked, error.details() or "ask for less")],
        metadata=dict(info.metadata) if info is not None else None,
    )


def work_size(size: SearchSize, trials: Sequence[tuning.Trial], facts: ModelFacts) -> placement_service_pb2.WorkSize:
    """Return the message of a search's size."""
    return placement_service_pb2.WorkSize(
        train_tokens=size.train_tokens,
        evaluation_tokens=size.evaluation_tokens,
        steps=size.steps,
        total_lora_rank=size.total_lora_rank,
        base_parameters=facts.parameters,
        expected_share=size.expected_share,
        trials=size.trials,
        longest_steps=size.longest_steps,
        shape=size.shape,
        least_memory_bytes=least_memory_bytes(trials, facts),
        adapter_memory_bytes=adapter_memory_bytes(trials, facts),
    )


def tuning_work(
    task: Task, trials: Sequence[Trial], train: Dataset, validation: Dataset | None
) -> placement_pb2.TuningWork:
    """Return everything that a node needs to train a task, every default filled in."""
    spec = tuning_pb2.TuningTaskSpec.FromString(task.spec)
    return placement_pb2.TuningWork(
        task_id=task.task_id,
        base_model=task.base_model,
        train=_artifact(train),
        validation=_artifact(validation) if validation else None,
        validation_fraction=validation_fraction(spec),
        objective=tuning_wire.objective_to_wire(tuning_wire.objective_from_wire(spec.objective)),
        early_exit=tuning_wire.early_exit_to_wire(tuning_wire.early_exit_from_wire(spec.early_exit)),
        evaluation=tuning_wire.evaluation_to_wire(tuning_wire.evaluation_from_wire(spec.evaluation)),
        trials=[
            placement_pb2.PlannedTrial(trial_id=trial.trial_id, config=tuning_pb2.TrialConfig.FromString(trial.config))
            for trial in trials
        ],
        artifact_folder=task.artifact_folder,
    )


def _artifact(dataset: Dataset) -> placement_pb2.Artifact:
    return placement_pb2.Artifact(path=dataset.path, size_bytes=dataset.size_bytes, sha256=dataset.sha256)
