"""The map from what admission keeps to the messages of the contract."""

from __future__ import annotations

from alto.v1 import admission_service_pb2, dataset_pb2, tuning_pb2
from alto_common.base_models import ModelFacts
from google.protobuf import duration_pb2, timestamp_pb2

from alto_admission.domain.task import Metric, Task, Trial
from alto_admission.store.datasets import Dataset
from alto_admission.uploads import Usage


def timestamp(time_us: int | None) -> timestamp_pb2.Timestamp | None:
    """Return a moment; None stays None."""
    if time_us is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromMicroseconds(time_us)
    return message


def duration(span_us: int | None) -> duration_pb2.Duration | None:
    """Return a span of time; None stays None."""
    if span_us is None:
        return None
    message = duration_pb2.Duration()
    message.FromMicroseconds(span_us)
    return message


def task_to_wire(task: Task, forecast: tuning_pb2.TaskForecast | None = None) -> tuning_pb2.TuningTask:
    """Return a task as its tenant sees it."""
    message = tuning_pb2.TuningTask(
        task_id=task.task_id,
        spec=tuning_pb2.TuningTaskSpec.FromString(task.spec),
        state=task.state,
        etag=task.etag,
        create_time=timestamp(task.create_us),
        start_time=timestamp(task.start_us),
        end_time=timestamp(task.end_us),
        trial_count=task.trial_count,
        best_trial_id=task.best_trial_id or "",
        best_validation_loss=task.best_validation_loss,
        base_validation_loss=task.base_validation_loss,
        savings=tuning_pb2.Savings(
            samples_planned=task.samples_planned,
            samples_trained=task.samples_trained,
            trials_stopped=task.trials_stopped,
        ),
        fraction_done=task.fraction_done,
        time_remaining=duration(task.time_remaining_us),
        last_event_sequence=task.last_event_sequence,
        node_id=task.node_id,
        forecast=forecast,
    )
    if task.queue_reason:
        message.queue.CopyFrom(
            tuning_pb2.QueueStatus(
                reason=task.queue_reason,
                explanation=task.queue_explanation,
                predicted_start_time=timestamp(task.predicted_start_us),
                predicted_end_time=timestamp(task.predicted_end_us),
            )
        )
    if task.failure_reason:
        message.failure.CopyFrom(tuning_pb2.Failure(reason=task.failure_reason, message=task.failure_message))
    return message


def trial_to_wire(trial: Trial) -> tuning_pb2.Trial:
    """Return a trial as its tenant sees it."""
    message = tuning_pb2.Trial(
        trial_id=trial.trial_id,
        task_id=trial.task_id,
        config=tuning_pb2.TrialConfig.FromString(trial.config),
        state=trial.state,
        step=trial.step,
        total_steps=trial.total_steps,
        train_loss_smoothed=trial.train_loss_smoothed,
        validation_loss=trial.validation_loss,
        best_validation_loss=trial.best_validation_loss,
        best_step=trial.best_step,
        samples_trained=trial.samples_trained,
    )
    if trial.decision is not None:
        decision = tuning_pb2.StoppingDecision.FromString(trial.decision)
        # A later decision to keep takes back the one that had paused it.
        if decision.verdict != tuning_pb2.VERDICT_KEEP:
            message.decision.CopyFrom(decision)
    if trial.failure_reason:
        message.failure.CopyFrom(tuning_pb2.Failure(reason=trial.failure_reason, message=trial.failure_message))
    if trial.adapter is not None:
        message.adapter.ParseFromString(trial.adapter)
    return message


def metric_to_wire(metric: Metric) -> tuning_pb2.TrialMetric:
    """Return a point of a curve."""
    return tuning_pb2.TrialMetric(
        step=metric.step,
        time=timestamp(metric.time_us),
        train_loss=metric.train_loss,
        train_loss_smoothed=metric.train_loss_smoothed,
        validation_loss=metric.validation_loss,
        learning_rate=metric.learning_rate,
    )


def dataset_to_wire(dataset: Dataset) -> dataset_pb2.Dataset:
    """Return a dataset as its tenant sees it."""
    return dataset_pb2.Dataset(
        dataset_id=dataset.dataset_id,
        display_name=dataset.display_name,
        format=dataset.format,
        row_count=dataset.row_count,
        size_bytes=dataset.size_bytes,
        sha256=dataset.sha256,
        duplicate_count=dataset.duplicate_count,
        create_time=timestamp(dataset.create_us),
    )


def usage_to_wire(usage: Usage) -> admission_service_pb2.DatasetUsage:
    """Return what a tenant's datasets take of its quota, as it sees it."""
    uploads = (
        admission_service_pb2.UnfinishedUpload(
            dataset_id=upload.dataset_id,
            request_id=upload.request_id,
            size_bytes=upload.size_bytes,
            update_time=timestamp(upload.create_us),
        )
        for upload in usage.unfinished
    )
    return admission_service_pb2.DatasetUsage(
        used_bytes=usage.used_bytes, quota_bytes=usage.quota_bytes, unfinished_uploads=uploads
    )


def base_model_to_wire(name: str, facts: ModelFacts) -> dataset_pb2.BaseModel:
    """Return a base model as callers choose it."""
    return dataset_pb2.BaseModel(
        name=name,
        architecture=facts.architecture,
        parameter_count=facts.parameters,
        context_length=facts.context_length,
        target_modules=sorted({module.rsplit(".", 1)[-1] for module in facts.linear_modules}),
    )
