"""One task in a worker: what it was told, its journal, its commands; and what its last word is."""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TextIO

import structlog
from alto.v1 import error_pb2, event_pb2, placement_pb2, tuning_pb2
from alto_common.artifacts import ArtifactStore
from alto_common.base_models import BaseModelError, UnknownModelError, resolve
from alto_common.errors import DomainError, Reason
from alto_common.tuning import TuningJob

from alto_training.adapters import publish
from alto_training.assignments import StopReason
from alto_training.control import CommandReader
from alto_training.datasets import fetch, split
from alto_training.executor import events
from alto_training.executor.control import Cancel, Command, Pause, StopTrial
from alto_training.executor.errors import ExecutorError
from alto_training.journal import JOURNAL_FILE, JournalWriter
from alto_training.sharding.errors import RankFailedError
from alto_training.wire import EventTranslator, failure, is_important, job_from_wire, task_state_changed
from alto_training.worker_order import WORK_FILE, WorkerOrder

EXECUTOR_FOLDER = "executor"
LOCK_FILE = "lock"
LOCK_WAIT_S = 30.0
_ABSOLUTE_PATH = re.compile(r"(?<![\w./:-])/(?:[^\s/'\":;,()]+/)+([^\s/'\":;,()]*)")

log = structlog.get_logger("alto.worker")


class TaskLockedError(Exception):
    """Another worker holds the task's folder."""


@dataclass
class WorkerTask:
    """A task that this worker trains. `take_lock` comes before its task's folder is touched, `end` or `close` last."""

    folder: Path
    order: WorkerOrder
    work: placement_pb2.TuningWork
    journal: JournalWriter
    commands: CommandReader
    stopped_trial_ids: list[str]
    lock: TextIO | None = None
    is_closed: bool = False
    job: TuningJob | None = None
    sink: EventSink | None = None
    stop_reason: StopReason | None = None
    guest_folders: list[Path] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, order: WorkerOrder) -> Self:
        """Take up what lies in the folder of one attempt."""
        work = placement_pb2.TuningWork.FromString((folder / WORK_FILE).read_bytes())
        journal = JournalWriter(folder / JOURNAL_FILE)
        return cls(folder, order, work, journal, CommandReader(folder), list(order.stopped_trial_ids))

    @property
    def task_id(self) -> str:
        """The task's name."""
        return self.work.task_id

    @property
    def workdir(self) -> Path:
        """Where its checkpoints and adapters lie."""
        return Path(self.order.task_folder) / EXECUTOR_FOLDER

    def take_lock(self) -> None:
        """Have the task's folder for this process and its ranks alone, until `close`. Raises TaskLockedError."""
        self.lock = _lock(Path(self.order.task_folder) / LOCK_FILE)

    def prepare(self) -> TuningJob:
        """Fetch its rows, find its base model, and return its job.

        Raises DomainError, BaseModelError, FileNotFoundError, StoreUnreachableError.
        """
        order, work = self.order, self.work
        store = ArtifactStore(order.artifact_root)
        folders = [Path(folder) for folder in order.model_folders]
        model = resolve(work.base_model, Path(order.models_root), folders, order.allow_hub)
        cache = Path(order.dataset_cache)
        train = fetch(store, work.train, cache)
        if work.HasField("validation"):
            validation = fetch(store, work.validation, cache)
        else:
            train, validation = split(train, work.validation_fraction or 0.1, cache)
        self.job = job_from_wire(work, model.location, str(train), str(validation))
        self.sink = EventSink(
            EventTranslator(self.job, order.node_id), self.journal, store, work.artifact_folder, order.epoch
        )
        return self.job

    def poll(self) -> Command | None:
        """Return the next command about this task, None when there is none; folders of guests are put aside."""
        if self.stopped_trial_ids:
            return StopTrial(self.stopped_trial_ids.pop(0), self.task_id)
        command = self.commands.next()
        if command is None:
            return None
        if command["command"] == "take_in":
            self.guest_folders.append(Path(command["guest_folder"]))
            return self.poll()
        if command["command"] == "stop_trials":
            self.stopped_trial_ids.extend(command["trial_ids"])
            return self.poll()
        self.stop_reason = StopReason(command["reason"])
        is_over = self.stop_reason is StopReason.CANCELLED
        return Cancel(task_id=self.task_id) if is_over else Pause(self.task_id)

    def take(self, event: events.Event) -> None:
        """Take one event of the executor."""
        if self.sink is not None:
            self.sink(event)

    def end(self, last: event_pb2.TaskEvent) -> None:
        """Say the last word, and let go of the task."""
        self.journal.append(last, durable=True)
        self.close()

    def close(self) -> None:
        """Let go of the task."""
        self.is_closed = True
        self.journal.close()
        if self.lock is not None:
            self.lock.close()

    def stopped(self) -> event_pb2.TaskEvent:
        """Return the event of how a task stands that was asked to stop before it began."""
        is_over = self.stop_reason is StopReason.CANCELLED
        state = events.TaskState.CANCELLED if is_over else events.TaskState.PAUSED
        return _last_event(events.Outcome(self.task_id, state, (), None), self.stop_reason)

    def ended(self, outcome: events.Outcome) -> event_pb2.TaskEvent:
        """Tell what was not told yet of an outcome, and return the event of how the task stands."""
        if self.sink is not None:
            self.sink.tell_rest(outcome)
        return _last_event(outcome, self.stop_reason)

    def failed(self, error: Exception) -> event_pb2.TaskEvent:
        """Return the event that the task cannot be trained (see `is_untrainable`)."""
        reason: Reason = error_pb2.ERROR_REASON_EXECUTION_FAILED
        if isinstance(error, DomainError):
            reason = error.reason
        elif isinstance(error, BaseModelError):
            reason = error_pb2.ERROR_REASON_UNKNOWN_BASE_MODEL
        return self.not_trained(tuning_pb2.TASK_STATE_FAILED, str(error), reason)

    def not_trained(
        self,
        state: tuning_pb2.TaskState.ValueType,
        message: str,
        reason: Reason = error_pb2.ERROR_REASON_EXECUTION_FAILED,
    ) -> event_pb2.TaskEvent:
        """Return the event that the task failed, or waits again because it cannot share this worker."""
        return task_state_changed(self.task_id, state, failure(reason, without_host_paths(message)))


def is_untrainable(error: Exception) -> bool:
    """Whether any attempt would end in the same way.

    A rank that failed is as a worker that died: it may not. Nor where the base model, which admission has seen, is
    unknown on this host.
    """
    passing = isinstance(error, RankFailedError | UnknownModelError)
    return isinstance(error, DomainError | BaseModelError | ExecutorError) and not passing


def without_host_paths(message: str) -> str:
    """Return what a tenant may read: of each path on this host only its last part."""
    return _ABSOLUTE_PATH.sub(lambda found: found.group(1), message)


@dataclass
class EventSink:
    """Takes the executor's events: publishes adapters, writes the journal."""

    translator: EventTranslator
    journal: JournalWriter
    store: ArtifactStore
    artifact_folder: str
    epoch: int
    finished: set[str] = field(default_factory=set)

    def __call__(self, event: events.Event) -> None:
        """Take one event."""
        if isinstance(event, events.TrialFinished):
            self.finished.add(event.trial_id)
            if event.adapter_path is not None:
                adapter = publish(self.store, self.artifact_folder, self.epoch, event)
                self.journal.append(adapter, durable=False)
        if isinstance(event, events.TickHalved):
            log.warning("out of memory: tick halved", tokens_per_tick=event.tokens_per_tick)
        for message in self.translator.translate(event):
            self.journal.append(message, durable=is_important(message))

    def tell_rest(self, outcome: events.Outcome) -> None:
        """Tell of trials that ended in an earlier attempt: whether that one's last words arrived is not known here."""
        for trial in outcome.trials:
            if trial.trial_id not in self.finished:
                self(trial)


def _last_event(outcome: events.Outcome, stop_reason: StopReason | None) -> event_pb2.TaskEvent:
    if outcome.state is events.TaskState.CANCELLED:
        return task_state_changed(outcome.task_id, tuning_pb2.TASK_STATE_CANCELLED)
    if outcome.state is events.TaskState.PAUSED:
        paused = stop_reason is StopReason.PAUSED
        state = tuning_pb2.TASK_STATE_PAUSED if paused else tuning_pb2.TASK_STATE_QUEUED
        return task_state_changed(outcome.task_id, state)
    if any(trial.adapter_path is not None for trial in outcome.trials):
        return task_state_changed(outcome.task_id, tuning_pb2.TASK_STATE_SUCCEEDED)
    reasons = "; ".join(dict.fromkeys(trial.reason for trial in outcome.trials))
    cause = failure(error_pb2.ERROR_REASON_EXECUTION_FAILED, f"no trial left an adapter: {reasons}")
    return task_state_changed(outcome.task_id, tuning_pb2.TASK_STATE_FAILED, cause)


def _lock(path: Path, clock: Callable[[], float] = time.monotonic) -> TextIO:
    """Take the task's lock. A worker of a killed node may hold it for the moment that its end takes."""
    file = path.open("w")
    deadline = clock() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if clock() > deadline:
                file.close()
                raise TaskLockedError(f"another worker still holds {path}") from None
            time.sleep(0.1)
        else:
            return file
