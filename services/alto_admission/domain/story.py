"""The story of a task: each thing that happens to it, applied in order, and the numbered events that tell of it.

A story is opened on a task whose row is locked, told what happened, and closed; whoever keeps it writes the task, its
trials, the new events and the new metrics in one transaction.

Reports are at-least-once: after a resume a node trains the steps since its checkpoint again and reports them under a
higher epoch. What is already known makes no new event, and the final state is the same as without the interruption.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from alto.v1 import error_pb2, event_pb2, placement_service_pb2, tuning_pb2
from alto_common.errors import reason_name

from alto_admission.domain import trial_story
from alto_admission.domain.moments import moment_us, span_us
from alto_admission.domain.task import (
    TRIAL_CANCELLED,
    TRIAL_FAILED,
    TRIAL_PAUSED,
    TRIAL_PENDING,
    TRIAL_RUNNING,
    TRIAL_STOPPED,
    Metric,
    Standing,
    Task,
    Trial,
    finite,
)
from alto_admission.domain.task_states import (
    CANCELLED,
    CANCELLING,
    FAILED,
    PAUSED,
    QUEUED,
    REPORTED_STATES,
    RUNNING,
    SUCCEEDED,
    Report,
    Request,
    State,
    after_report,
    after_request,
)

# A predicted time that moves by less is not worth an event.
PREDICTION_SLACK_US = 10_000_000


class DeliveryKind(enum.StrEnum):
    """What placement must hear of a task."""

    ENQUEUE = "enqueue"
    UPDATE = "update"
    DEQUEUE = "dequeue"


@dataclass(frozen=True)
class Delivery:
    """A message to placement; `content` is the UpdateTaskRequest of an update, else empty."""

    kind: DeliveryKind
    content: bytes = b""


class Story:
    """One task with all its trials, open for changes. `now_us` is the time of what has no time of its own.

    `events`, `metrics` and `deliveries` are what is new and must be kept together with the task.
    """

    def __init__(self, task: Task, trials: Sequence[Trial], now_us: int) -> None:
        self.task = task
        self.trials = {trial.trial_id: trial for trial in sorted(trials, key=lambda trial: trial.position)}
        self.events: list[event_pb2.TaskEvent] = []
        self.metrics: list[Metric] = []
        self.deliveries: list[Delivery] = []
        self._now_us = now_us

    def begin(self) -> None:
        """Tell that the task was admitted."""
        self._tell(task_state_changed=event_pb2.TaskStateChanged(state=self.task.state))
        self.deliveries.append(Delivery(DeliveryKind.ENQUEUE))

    def request(self, request: Request) -> bool:
        """Carry out a tenant's request; return whether it changed anything. Raises STATE_CONFLICT."""
        following = after_request(self.task.state, request)
        if following == self.task.state:
            return False
        if following == QUEUED:
            self.task.queue_reason, self.task.queue_explanation = "RESUMING", "the task is being queued again"
        self._enter(following)
        if request is Request.CANCEL:
            self.deliveries.append(Delivery(DeliveryKind.DEQUEUE))
        else:
            self._update_placement(held=request is Request.PAUSE)
        return True

    def stop_trial(self, trial: Trial) -> bool:
        """Ask for the end of one trial; return whether that is new. A trial or task that has ended stays as it is."""
        if self.task.ended or trial.ended or trial.stop_requested:
            return False
        trial.stop_requested = True
        self._update_placement(stop_trial_ids=[trial.trial_id])
        return True

    def queued(self, status: tuning_pb2.QueueStatus) -> None:
        """Take over why the task waits, and until when."""
        task = self.task
        if task.state != QUEUED or not is_news(task, status):
            return
        task.queue_reason, task.queue_explanation = status.reason, status.explanation
        task.predicted_start_us = moment_us(status.predicted_start_time)
        task.predicted_end_us = moment_us(status.predicted_end_time)
        self._tell(task_queued=event_pb2.TaskQueued(queue=status))

    def enqueue_again(self) -> None:
        """Hand the task to placement once more; it passes a task that it knows over."""
        self.deliveries.append(Delivery(DeliveryKind.ENQUEUE))

    def released(self) -> None:
        """Take note that no node holds the task any more, though it has not ended."""
        self._report(Report.RELEASED)

    def failed(self, failure: tuning_pb2.Failure) -> None:
        """Take note that the task cannot be trained."""
        self._report(Report.FAILED, failure)

    def reported(self, epoch: int, event: event_pb2.TaskEvent) -> None:
        """Apply one event that the node of `epoch` reported. An event that is no news leaves no trace."""
        if self.task.ended:
            return
        time_us = moment_us(event.time) or self._now_us
        if event.trial_id:
            trial = self.trials.get(event.trial_id)
            if trial is not None:
                public = trial_story.apply(trial, epoch, event, time_us, self.metrics)
                if public is not None:
                    self._publish(public, time_us)
            return
        match event.WhichOneof("payload"):
            case "task_state_changed":
                report = REPORTED_STATES.get(event.task_state_changed.state)
                if report is not None:
                    self._report(report, event.task_state_changed.failure)
            case "execution_started":
                self._started(event.execution_started, time_us)
            case "task_progressed":
                self._progressed(event, time_us)
            case "checkpoint_written":
                self._tell(time_us, checkpoint_written=event.checkpoint_written)
            case _:
                return

    def close(self) -> None:
        """Bring what is counted over all trials up to date."""
        task = self.task
        task.samples_trained = sum(trial.samples_trained for trial in self.trials.values())
        task.trials_stopped = sum(trial.state == TRIAL_STOPPED for trial in self.trials.values())
        best = self.best_trial()
        task.best_trial_id = best.trial_id if best else None
        task.best_validation_loss = _rank(best) if best else None

    def best_trial(self) -> Trial | None:
        """Return the trial with the lowest validation loss; of an ended task, only among those with an adapter."""
        ranked = [
            trial
            for trial in self.trials.values()
            if _rank(trial) is not None and (trial.adapter is not None or not self.task.ended)
        ]
        return min(ranked, key=lambda trial: (_rank(trial), trial.position), default=None)

    def _update_placement(self, *, held: bool | None = None, stop_trial_ids: Sequence[str] = ()) -> None:
        update = placement_service_pb2.UpdateTaskRequest(
            task_id=self.task.task_id, held=held, stop_trial_ids=stop_trial_ids
        )
        self.deliveries.append(Delivery(DeliveryKind.UPDATE, update.SerializeToString()))

    def _started(self, started: event_pb2.ExecutionStarted, time_us: int) -> None:
        task = self.task
        task.node_id = started.node_id
        if started.HasField("base_validation_loss"):
            task.base_validation_loss = finite(started.base_validation_loss)
        if task.start_us is None:
            task.start_us = time_us
        self._report(Report.STARTED)
        self._tell(time_us, execution_started=started)

    def _progressed(self, event: event_pb2.TaskEvent, time_us: int) -> None:
        progress = event.task_progressed
        fraction = min(1.0, finite(progress.fraction_done) or 0.0)
        if fraction < self.task.fraction_done:
            return
        self.task.fraction_done = fraction
        if progress.HasField("time_remaining"):
            self.task.time_remaining_us = span_us(progress.time_remaining)
        self._tell(time_us, task_progressed=progress)

    def _report(self, report: Report, failure: tuning_pb2.Failure | None = None) -> None:
        following = after_report(self.task.state, report)
        if following == self.task.state:
            return
        if following == SUCCEEDED and not any(trial.adapter for trial in self.trials.values()):
            following, failure = FAILED, _execution_failed("every trial ended and none left an adapter")
        if following == QUEUED:
            self.task.queue_reason = "PLACED_AGAIN"
            self.task.queue_explanation = "its node let go of it; it carries on from its last checkpoint elsewhere"
        self._enter(following, failure)

    def _enter(self, state: State, failure: tuning_pb2.Failure | None = None) -> None:
        """Move the task, then its trials with it. The event of a task that ends is its last."""
        task = self.task
        task.state = state
        if state != QUEUED:
            task.queue_reason = task.queue_explanation = ""
            task.predicted_start_us = task.predicted_end_us = None
        if state not in (RUNNING, CANCELLING):
            task.time_remaining_us = None
        if state == FAILED:
            given = failure if failure is not None and failure.reason else _execution_failed("no reason was given")
            failure = given
            task.failure_reason, task.failure_message = given.reason, given.message
        if state in (QUEUED, PAUSED):
            task.node_id = ""
            self._park_trials()
        if task.ended:
            task.end_us = self._now_us
            self._end_trials(failure)
            if state == SUCCEEDED:
                task.fraction_done = 1.0
        changed = event_pb2.TaskStateChanged(state=state, failure=failure if state == FAILED else None)
        self._tell(task_state_changed=changed)

    def _park_trials(self) -> None:
        for trial in self.trials.values():
            if not trial.ended:
                # The next execution may carry on from an earlier step than this one's last change of state.
                trial.state_step = 0
            if trial.state in (TRIAL_RUNNING, TRIAL_PAUSED):
                trial.state = TRIAL_PENDING
                self._tell_trial(trial)

    def _end_trials(self, failure: tuning_pb2.Failure | None) -> None:
        for trial in self.trials.values():
            if trial.ended:
                continue
            if self.task.state == CANCELLED:
                trial.state = TRIAL_CANCELLED
            else:
                trial.state = TRIAL_FAILED
                given = failure or _execution_failed("the task ended without a report of this trial's end")
                trial.failure_reason, trial.failure_message = given.reason, given.message
            self._tell_trial(trial)

    def _tell_trial(self, trial: Trial) -> None:
        self._publish(trial_story.state_event(trial), self._now_us)

    def _tell(self, time_us: int | None = None, **payload: object) -> None:
        event = event_pb2.TaskEvent(**payload)  # type: ignore[arg-type]  # one field of the payload's oneof
        self._publish(event, self._now_us if time_us is None else time_us)

    def _publish(self, event: event_pb2.TaskEvent, time_us: int) -> None:
        self.task.last_event_sequence += 1
        event.task_id = self.task.task_id
        event.sequence = self.task.last_event_sequence
        event.time.FromMicroseconds(time_us)
        self.events.append(event)


def _rank(trial: Trial) -> float | None:
    """Return what a trial is judged by: the loss of the adapter one can download, else the lowest loss so far."""
    return trial.best_validation_loss if trial.adapter_loss is None else trial.adapter_loss


def _execution_failed(message: str) -> tuning_pb2.Failure:
    return tuning_pb2.Failure(reason=reason_name(error_pb2.ERROR_REASON_EXECUTION_FAILED), message=message)


def is_news(task: Standing, status: tuning_pb2.QueueStatus) -> bool:
    """Return whether a queue's status says anything that is not known of a task."""
    return (
        (task.queue_reason, task.queue_explanation) != (status.reason, status.explanation)
        or not _near(task.predicted_start_us, moment_us(status.predicted_start_time))
        or not _near(task.predicted_end_us, moment_us(status.predicted_end_time))
    )


def _near(one: int | None, other: int | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) < PREDICTION_SLACK_US
