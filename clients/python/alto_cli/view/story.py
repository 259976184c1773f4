"""The story of a task as it unfolds: the task and its trials, kept up to date by snapshots and events."""

from __future__ import annotations

import math

from alto.v1 import admission_service_pb2 as messages
from alto.v1 import event_pb2, tuning_pb2

ENDED_TASKS = (tuning_pb2.TASK_STATE_SUCCEEDED, tuning_pb2.TASK_STATE_FAILED, tuning_pb2.TASK_STATE_CANCELLED)
STOPPED_OR_DONE = (
    tuning_pb2.TRIAL_STATE_SUCCEEDED,
    tuning_pb2.TRIAL_STATE_STOPPED,
    tuning_pb2.TRIAL_STATE_FAILED,
    tuning_pb2.TRIAL_STATE_CANCELLED,
)


class Story:
    """What is known of a task: `task` and `trials` as messages of the contract, and what only events tell."""

    def __init__(self) -> None:
        self.task = tuning_pb2.TuningTask()
        self.trials: dict[str, tuning_pb2.Trial] = {}
        self.execution = event_pb2.ExecutionStarted()
        self.progress = event_pb2.TaskProgressed()

    @property
    def has_ended(self) -> bool:
        """Whether the task is in a state that it never leaves."""
        return self.task.state in ENDED_TASKS

    def apply(self, message: messages.WatchTuningTaskResponse) -> None:
        """Take in one message of a watch."""
        kind = message.WhichOneof("message")
        if kind == "snapshot":
            self.replace(message.snapshot.task, list(message.snapshot.trials))
        elif kind == "event":
            self.apply_event(message.event)

    def replace(self, task: tuning_pb2.TuningTask, trials: list[tuning_pb2.Trial]) -> None:
        """Take a whole state in place of what was known."""
        self.task.CopyFrom(task)
        self.trials = {trial.trial_id: trial for trial in trials}
        self.progress.fraction_done = task.fraction_done
        if task.HasField("time_remaining"):
            self.progress.time_remaining.CopyFrom(task.time_remaining)

    def apply_event(self, event: event_pb2.TaskEvent) -> None:
        """Take in one event."""
        kind = event.WhichOneof("payload")
        if kind is None:
            return
        payload = getattr(event, kind)
        if event.trial_id:
            trial = self.trials.setdefault(event.trial_id, tuning_pb2.Trial(trial_id=event.trial_id))
            self._apply_to_trial(trial, kind, payload)
        else:
            self._apply_to_task(kind, payload)
        if kind == "task_state_changed":
            if payload.state == tuning_pb2.TASK_STATE_RUNNING and not self.task.HasField("start_time"):
                self.task.start_time.CopyFrom(event.time)
            if self.has_ended:
                self.task.end_time.CopyFrom(event.time)
        self.task.last_event_sequence = max(self.task.last_event_sequence, event.sequence)

    def _apply_to_task(self, kind: str, payload: object) -> None:
        match payload:
            case event_pb2.TaskStateChanged():
                self.task.state = payload.state
                if payload.HasField("failure"):
                    self.task.failure.CopyFrom(payload.failure)
            case event_pb2.TaskQueued():
                self.task.queue.CopyFrom(payload.queue)
            case event_pb2.ExecutionStarted():
                self.execution.CopyFrom(payload)
                self.task.node_id = payload.node_id
                if payload.HasField("base_validation_loss"):
                    self.task.base_validation_loss = payload.base_validation_loss
            case event_pb2.TaskProgressed():
                self.progress.CopyFrom(payload)
                self.task.fraction_done = payload.fraction_done

    def _apply_to_trial(self, trial: tuning_pb2.Trial, kind: str, payload: object) -> None:
        match payload:
            case event_pb2.TrialStateChanged():
                trial.state = payload.state
                trial.step = max(trial.step, payload.step)
                trial.total_steps = payload.total_steps or trial.total_steps
                trial.samples_trained = max(trial.samples_trained, payload.samples_trained)
                if payload.HasField("failure"):
                    trial.failure.CopyFrom(payload.failure)
            case event_pb2.TrialMeasured():
                self._measure(trial, payload)
            case event_pb2.TrialDecided():
                trial.decision.CopyFrom(payload.decision)
            case event_pb2.AdapterReady():
                trial.adapter.CopyFrom(payload.adapter)

    def _measure(self, trial: tuning_pb2.Trial, measured: event_pb2.TrialMeasured) -> None:
        metric = measured.metric
        trial.step = max(trial.step, metric.step)
        trial.total_steps = measured.total_steps or trial.total_steps
        trial.samples_trained = max(trial.samples_trained, measured.samples_trained)
        if metric.HasField("train_loss_smoothed"):
            trial.train_loss_smoothed = metric.train_loss_smoothed
        if not metric.HasField("validation_loss"):
            return
        trial.validation_loss = metric.validation_loss
        if math.isfinite(metric.validation_loss) and metric.validation_loss < best_loss(trial):
            trial.best_validation_loss = metric.validation_loss
            trial.best_step = metric.step
        if best_loss(trial) < (
            self.task.best_validation_loss if self.task.HasField("best_validation_loss") else math.inf
        ):
            self.task.best_validation_loss = trial.best_validation_loss
            self.task.best_trial_id = trial.trial_id


def best_loss(trial: tuning_pb2.Trial) -> float:
    """Return a trial's lowest validation loss, infinite when it has none."""
    return trial.best_validation_loss if trial.HasField("best_validation_loss") else math.inf


def ranked(trials: list[tuning_pb2.Trial]) -> list[tuning_pb2.Trial]:
    """Return trials by their lowest validation loss; those without one last, in their own order."""
    return sorted(trials, key=best_loss)
