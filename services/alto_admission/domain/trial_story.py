"""What one reported event does to one trial, and the event that clients see of it: none when it is no news."""

from __future__ import annotations

from alto.v1 import event_pb2, tuning_pb2

from alto_admission.domain.moments import moment_us
from alto_admission.domain.search import MAX_SAMPLES
from alto_admission.domain.task import TRIAL_TERMINAL, Metric, Trial, finite


def apply(
    trial: Trial, epoch: int, event: event_pb2.TaskEvent, time_us: int, metrics: list[Metric]
) -> event_pb2.TaskEvent | None:
    """Apply `event` of the node of `epoch` to `trial`, add its measurement to `metrics`, return the public event."""
    match event.WhichOneof("payload"):
        case "trial_state_changed":
            return _state_changed(trial, epoch, event.trial_state_changed)
        case "trial_measured":
            return _measured(trial, event.trial_measured, time_us, metrics)
        case "trial_decided":
            return _decided(trial, event.trial_decided.decision)
        case "adapter_ready":
            return _adapter_ready(trial, event.adapter_ready)
        case _:
            return None


def state_event(trial: Trial) -> event_pb2.TaskEvent:
    """Return the event that tells the state of a trial."""
    failure = None
    if trial.failure_reason:
        failure = tuning_pb2.Failure(reason=trial.failure_reason, message=trial.failure_message)
    changed = event_pb2.TrialStateChanged(
        state=trial.state,
        failure=failure,
        total_steps=trial.total_steps,
        step=trial.step,
        samples_trained=trial.samples_trained,
    )
    return event_pb2.TaskEvent(trial_id=trial.trial_id, trial_state_changed=changed)


def _state_changed(trial: Trial, epoch: int, changed: event_pb2.TrialStateChanged) -> event_pb2.TaskEvent | None:
    _advance(trial, changed.step, changed.total_steps, changed.samples_trained)
    if changed.state in (trial.state, tuning_pb2.TRIAL_STATE_UNSPECIFIED):
        return None
    if epoch > trial.state_epoch and (
        changed.step < trial.state_step or (trial.ended and changed.state not in TRIAL_TERMINAL)
    ):
        # A resumed execution repeats what happened since its checkpoint.
        return None
    trial.state = changed.state
    trial.state_epoch, trial.state_step = epoch, changed.step
    trial.failure_reason, trial.failure_message = changed.failure.reason, changed.failure.message
    return state_event(trial)


def _measured(
    trial: Trial, measured: event_pb2.TrialMeasured, time_us: int, metrics: list[Metric]
) -> event_pb2.TaskEvent | None:
    metric = measured.metric
    time_us = moment_us(metric.time) or time_us
    train_loss = finite(metric.train_loss) if metric.HasField("train_loss") else None
    smoothed = finite(metric.train_loss_smoothed) if metric.HasField("train_loss_smoothed") else None
    validation_loss = finite(metric.validation_loss) if metric.HasField("validation_loss") else None
    learning_rate = finite(metric.learning_rate) if metric.HasField("learning_rate") else None
    metrics.append(Metric(trial.trial_id, metric.step, time_us, train_loss, smoothed, validation_loss, learning_rate))
    _advance(trial, metric.step, measured.total_steps, measured.samples_trained)
    trained = metric.HasField("train_loss") and metric.step > trial.train_step
    if trained:
        trial.train_step = metric.step
        if smoothed is not None:
            trial.train_loss_smoothed = smoothed
    evaluated = metric.HasField("validation_loss") and metric.step > trial.validation_step
    if evaluated:
        trial.validation_step = metric.step
        trial.validation_loss = validation_loss
        if validation_loss is not None and (
            trial.best_validation_loss is None or validation_loss < trial.best_validation_loss
        ):
            trial.best_validation_loss, trial.best_step = validation_loss, metric.step
    if not (trained or evaluated):
        return None
    return event_pb2.TaskEvent(trial_id=trial.trial_id, trial_measured=measured)


def _decided(trial: Trial, decision: tuning_pb2.StoppingDecision) -> event_pb2.TaskEvent | None:
    content = decision.SerializeToString(deterministic=True)
    if trial.decision is not None:
        known = tuning_pb2.StoppingDecision.FromString(trial.decision)
        if decision.step < known.step or content == trial.decision:
            return None
    trial.decision = content
    return event_pb2.TaskEvent(trial_id=trial.trial_id, trial_decided=event_pb2.TrialDecided(decision=decision))


def _adapter_ready(trial: Trial, ready: event_pb2.AdapterReady) -> event_pb2.TaskEvent | None:
    content = ready.adapter.SerializeToString(deterministic=True)
    if (content, ready.uri) == (trial.adapter, trial.adapter_folder):
        return None
    trial.adapter, trial.adapter_folder = content, ready.uri
    trial.adapter_loss = finite(ready.adapter.validation_loss)
    return event_pb2.TaskEvent(trial_id=trial.trial_id, adapter_ready=event_pb2.AdapterReady(adapter=ready.adapter))


def _advance(trial: Trial, step: int, total_steps: int, samples_trained: int) -> None:
    trial.step = max(trial.step, step)
    trial.total_steps = total_steps or trial.total_steps
    trial.samples_trained = max(trial.samples_trained, min(samples_trained, MAX_SAMPLES))
