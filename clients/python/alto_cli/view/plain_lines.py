"""A search as lines of plain text, one a noteworthy event: for logs, pipes and continuous integration."""

from __future__ import annotations

from alto.v1 import admission_service_pb2 as messages
from alto.v1 import event_pb2, tuning_pb2

from alto_cli.view.story import Story
from alto_cli.view.trial_words import config_text, state_word, task_state_word, varying_fields
from alto_cli.view.wording import count_text, duration_text, loss_text, percent_text, plural, printable

PROGRESS_EVERY = 0.1


class PlainLines:
    """Turns messages into lines. Call `lines` after the story has taken the message in."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self._told_fraction = 0.0
        self._told_queue = ""
        # From a reason to the first trial that failed for it.
        self._told_failures: dict[str, str] = {}

    def lines(self, message: messages.WatchTuningTaskResponse) -> list[str]:
        """Return what is worth saying of a message: nothing, or a line or two."""
        kind = message.WhichOneof("message")
        if kind == "snapshot":
            return [self._snapshot()]
        if kind == "compacted":
            return [f"{plural(message.compacted.events_left_out, 'event')} left out: this reader fell behind"]
        if kind == "event":
            return [printable(line) for line in self.event_lines(message.event)]
        return []

    def event_lines(self, event: event_pb2.TaskEvent) -> list[str]:
        """Return what is worth saying of an event."""
        kind = event.WhichOneof("payload")
        trial = self._story.trials.get(event.trial_id)
        if trial is None:
            return self._task_lines(kind, event)
        name = event.trial_id
        match kind:
            case "trial_state_changed" if not _told_by_decision(trial):
                return [f"{name} {self._state_sentence(trial)}"]
            case "trial_measured" if event.trial_measured.metric.HasField("validation_loss"):
                metric = event.trial_measured.metric
                best = " (best so far)" if self._is_best(name, metric.validation_loss) else ""
                smoothed = metric.train_loss_smoothed if metric.HasField("train_loss_smoothed") else None
                losses = f"validation loss {loss_text(metric.validation_loss)}, train loss {loss_text(smoothed)}"
                return [f"{name} step {metric.step}/{trial.total_steps}: {losses}{best}"]
            case "trial_decided" if event.trial_decided.decision.verdict != tuning_pb2.VERDICT_KEEP:
                decision = event.trial_decided.decision
                verb = "stopped" if decision.verdict == tuning_pb2.VERDICT_STOP else "paused"
                return [f"{name} {verb} by {decision.policy} ({decision.rule}): {decision.reason}"]
        return []

    def _task_lines(self, kind: str | None, event: event_pb2.TaskEvent) -> list[str]:
        task = self._story.task
        match kind:
            case "task_state_changed":
                # Why it failed is said at the end, with how its trials did.
                return [f"task {task_state_word(task)}"]
            case "task_queued" if event.task_queued.queue.explanation != self._told_queue:
                self._told_queue = event.task_queued.queue.explanation
                return [f"waiting: {self._told_queue}"]
            case "execution_started":
                return [self._execution(event.execution_started)]
            case "task_progressed":
                return self._progress_lines(event.task_progressed)
        return []

    def _snapshot(self) -> str:
        task = self._story.task
        name = f" ({printable(task.spec.display_name)})" if task.spec.display_name else ""
        return f"task {task.task_id}{name} {task_state_word(task)}, {plural(len(self._story.trials), 'trial')}"

    def _execution(self, started: event_pb2.ExecutionStarted) -> str:
        verb = "carries on from a checkpoint" if started.resumed else "begins"
        base = ""
        if started.HasField("base_validation_loss"):
            base = f"; base model's validation loss {loss_text(started.base_validation_loss)}"
        slots = plural(started.slots, "slot")
        return (
            f"training {verb} on {started.node_id} ({started.device}, {started.kernel_backend} kernels, {slots}){base}"
        )

    def _progress_lines(self, progress: event_pb2.TaskProgressed) -> list[str]:
        if progress.fraction_done < self._told_fraction + PROGRESS_EVERY and progress.fraction_done < 1:
            return []
        if progress.fraction_done <= self._told_fraction:
            return []
        self._told_fraction = progress.fraction_done
        rest = ""
        if progress.HasField("time_remaining"):
            rest = f", {duration_text(progress.time_remaining.ToTimedelta().total_seconds())} left"
        return [f"{percent_text(progress.fraction_done)} done{rest}, {count_text(progress.tokens_per_second)} tokens/s"]

    def _state_sentence(self, trial: tuning_pb2.Trial) -> str:
        match trial.state:
            case tuning_pb2.TRIAL_STATE_RUNNING:
                fields = varying_fields(list(self._story.trials.values()))
                return f"running: {config_text(trial, fields)}" if fields else "running"
            case tuning_pb2.TRIAL_STATE_FAILED:
                reason = trial.failure.message or trial.failure.reason
                first = self._told_failures.setdefault(reason, trial.trial_id)
                why = f": {reason}" if first == trial.trial_id else f" as {first} did"
                return f"failed at step {trial.step}{why}"
            case tuning_pb2.TRIAL_STATE_SUCCEEDED:
                best = trial.best_validation_loss if trial.HasField("best_validation_loss") else None
                return f"finished, best validation loss {loss_text(best)} at step {trial.best_step}"
        return f"{state_word(trial)} at step {trial.step}"

    def _is_best(self, trial_id: str, loss: float) -> bool:
        return self._story.task.best_trial_id == trial_id and self._story.task.best_validation_loss == loss


def _told_by_decision(trial: tuning_pb2.Trial) -> bool:
    """Whether the decision that was told just before says all about the trial's new state."""
    decided = trial.state in (tuning_pb2.TRIAL_STATE_STOPPED, tuning_pb2.TRIAL_STATE_PAUSED)
    return decided and trial.HasField("decision") and trial.decision.step == trial.step
