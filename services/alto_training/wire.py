"""From what an executor tells to the contract's events, and from the contract's work to an executor's job."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from alto.v1 import error_pb2, event_pb2, placement_pb2, tuning_pb2
from alto_common.errors import Reason, reason_name
from alto_common.tuning import TuningJob
from alto_common.tuning_wire import (
    early_exit_from_wire,
    evaluation_from_wire,
    objective_from_wire,
    trial_from_wire,
)

from alto_training.executor import events

TRIAL_STATES = {
    events.TrialState.SUCCEEDED: tuning_pb2.TRIAL_STATE_SUCCEEDED,
    events.TrialState.STOPPED: tuning_pb2.TRIAL_STATE_STOPPED,
    events.TrialState.FAILED: tuning_pb2.TRIAL_STATE_FAILED,
    events.TrialState.CANCELLED: tuning_pb2.TRIAL_STATE_CANCELLED,
}
VERDICTS = {
    events.Verdict.KEEP: tuning_pb2.VERDICT_KEEP,
    events.Verdict.PAUSE: tuning_pb2.VERDICT_PAUSE,
    events.Verdict.STOP: tuning_pb2.VERDICT_STOP,
    events.Verdict.REVIVE: tuning_pb2.VERDICT_KEEP,
}
USER_RULE = "user"
# Characters of an explanation.
LONGEST_TEXT = 8000


def job_from_wire(work: placement_pb2.TuningWork, base_model: str, train: str, validation: str) -> TuningJob:
    """Return the job of a task; `base_model` is where it lies here, `train` and `validation` are local files."""
    return TuningJob(
        task_id=work.task_id,
        base_model=base_model,
        train_path=train,
        validation_path=validation,
        trials=tuple(trial_from_wire(trial.trial_id, trial.config) for trial in work.trials),
        objective=objective_from_wire(work.objective),
        early_exit=early_exit_from_wire(work.early_exit),
        evaluation=evaluation_from_wire(work.evaluation),
        base_model_name=work.base_model,
    )


def failure(reason: Reason, message: str) -> tuning_pb2.Failure:
    """Return the message of a failure."""
    return tuning_pb2.Failure(reason=reason_name(reason), message=carried(message))


def carried(text: str) -> str:
    """Return a text as messages can carry and databases keep it, the middle left out when it is very long.

    What libraries and data put into their errors may hold NUL characters, and halves of surrogate pairs.
    """
    if len(text) > LONGEST_TEXT:
        text = f"{text[: LONGEST_TEXT // 2]} ... {text[-LONGEST_TEXT // 2 :]}"
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


def task_state_changed(
    task_id: str, state: tuning_pb2.TaskState.ValueType, cause: tuning_pb2.Failure | None = None
) -> event_pb2.TaskEvent:
    """Return the event that a task moved to another state, now."""
    event = event_pb2.TaskEvent(
        task_id=task_id, task_state_changed=event_pb2.TaskStateChanged(state=state, failure=cause)
    )
    event.time.GetCurrentTime()
    return event


def is_important(event: event_pb2.TaskEvent) -> bool:
    """Whether an event must be on the disk before the executor carries on; a lost curve point can be lived with."""
    kind = event.WhichOneof("payload")
    if kind == "trial_measured":
        return event.trial_measured.metric.HasField("validation_loss")
    return kind != "task_progressed"


@dataclass(frozen=True)
class EventTranslator:
    """Turns an executor's events into the contract's. `node_id` goes into ExecutionStarted."""

    job: TuningJob
    node_id: str

    def translate(self, event: events.Event) -> Iterator[event_pb2.TaskEvent]:
        """Yield the contract's events for one of the executor's; none for what the contract does not tell."""
        for message in self._translate(event):
            message.task_id = event.task_id
            message.time.GetCurrentTime()
            yield message

    def _translate(self, event: events.Event) -> Iterator[event_pb2.TaskEvent]:
        if isinstance(event, events.TaskStarted):
            yield event_pb2.TaskEvent(
                task_state_changed=event_pb2.TaskStateChanged(state=tuning_pb2.TASK_STATE_RUNNING)
            )
            yield event_pb2.TaskEvent(execution_started=self._started(event))
        elif isinstance(event, events.TrialStarted):
            yield _moved(event, tuning_pb2.TRIAL_STATE_RUNNING)
        elif isinstance(event, events.TrialPaused):
            yield _moved(event, tuning_pb2.TRIAL_STATE_PAUSED)
        elif isinstance(event, events.TrialProgress):
            metric = tuning_pb2.TrialMetric(
                step=event.step,
                train_loss=event.train_loss,
                train_loss_smoothed=event.train_loss_smoothed,
                learning_rate=event.learning_rate,
            )
            yield _measured(event, metric)
        elif isinstance(event, events.TrialEvaluated):
            metric = tuning_pb2.TrialMetric(
                step=event.step, train_loss_smoothed=event.train_loss_smoothed, validation_loss=event.validation_loss
            )
            yield _measured(event, metric)
        elif isinstance(event, events.TrialDecided):
            yield self._decided(event)
        elif isinstance(event, events.TrialFinished):
            yield self.finished(event)
        elif isinstance(event, events.TaskProgress):
            yield event_pb2.TaskEvent(task_progressed=self._progressed(event))
        elif isinstance(event, events.CheckpointWritten):
            yield event_pb2.TaskEvent(checkpoint_written=event_pb2.CheckpointWritten(tick=event.tick))

    def finished(self, event: events.TrialFinished) -> event_pb2.TaskEvent:
        """Return the event that a trial ended."""
        changed = event_pb2.TrialStateChanged(
            state=TRIAL_STATES[event.state],
            total_steps=event.total_steps,
            step=event.step,
            samples_trained=event.samples_trained,
        )
        if event.state is events.TrialState.FAILED:
            changed.failure.CopyFrom(failure(error_pb2.ERROR_REASON_EXECUTION_FAILED, event.reason))
        return event_pb2.TaskEvent(trial_id=event.trial_id, trial_state_changed=changed)

    def _started(self, event: events.TaskStarted) -> event_pb2.ExecutionStarted:
        return event_pb2.ExecutionStarted(
            node_id=self.node_id,
            device=event.device,
            kernel_backend=event.backend,
            slots=event.slots,
            tokens_per_tick=event.tokens_per_tick,
            resumed=event.resumed_from_tick is not None,
            base_validation_loss=event.base_validation_loss,
        )

    def _decided(self, event: events.TrialDecided) -> event_pb2.TaskEvent:
        decision = tuning_pb2.StoppingDecision(
            verdict=VERDICTS[event.verdict],
            policy=USER_RULE if event.rule == USER_RULE else self.job.early_exit.policy,
            rule=event.rule,
            reason=carried(event.reason),
            evidence=dict(event.evidence),
            threshold=event.threshold,
            step=event.step,
        )
        return event_pb2.TaskEvent(trial_id=event.trial_id, trial_decided=event_pb2.TrialDecided(decision=decision))

    def _progressed(self, event: events.TaskProgress) -> event_pb2.TaskProgressed:
        message = event_pb2.TaskProgressed(
            fraction_done=event.fraction_done,
            tokens_per_second=event.tokens_per_s,
            peak_memory_bytes=event.peak_memory_bytes,
            measured=event_pb2.MeasuredWork(**asdict(event.measured)),
            guest_memory_bytes=event.guest_memory_bytes,
        )
        if event.seconds_remaining is not None and math.isfinite(event.seconds_remaining):
            message.time_remaining.FromMilliseconds(int(event.seconds_remaining * 1000))
        return message


def _moved(
    event: events.TrialStarted | events.TrialPaused, state: tuning_pb2.TrialState.ValueType
) -> event_pb2.TaskEvent:
    changed = event_pb2.TrialStateChanged(
        state=state, total_steps=event.total_steps, step=event.step, samples_trained=event.samples_trained
    )
    return event_pb2.TaskEvent(trial_id=event.trial_id, trial_state_changed=changed)


def _measured(
    event: events.TrialProgress | events.TrialEvaluated, metric: tuning_pb2.TrialMetric
) -> event_pb2.TaskEvent:
    metric.time.GetCurrentTime()
    for name in ("train_loss", "train_loss_smoothed", "validation_loss"):
        # A loss that is not a number is told by its absence; the decision that follows says why.
        if metric.HasField(name) and not math.isfinite(getattr(metric, name)):
            metric.ClearField(name)
    measured = event_pb2.TrialMeasured(
        metric=metric, total_steps=event.total_steps, samples_trained=event.samples_trained
    )
    return event_pb2.TaskEvent(trial_id=event.trial_id, trial_measured=measured)
