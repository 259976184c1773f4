"""The process of one assignment: `python -m alto_training.worker FOLDER`. Runs the executor, writes the journal.

It ends with status 0 when its journal's last event says how the task stands; any other end is a crash, and the task is
worth another attempt. It never outlives its node: the kernel ends it with its parent.
"""

from __future__ import annotations

import fcntl
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import structlog
from alto.v1 import error_pb2, event_pb2, placement_pb2, tuning_pb2
from alto_common.artifacts import ArtifactStore
from alto_common.base_models import BaseModelError, resolve
from alto_common.errors import DomainError, reason_name
from alto_common.logs import configure_logs
from alto_common.tuning import TuningJob

from alto_training.adapters import publish
from alto_training.assignments import StopReason
from alto_training.control import CommandReader
from alto_training.datasets import fetch, split
from alto_training.executor import events
from alto_training.executor.control import Cancel, Command, Pause, StopTrial
from alto_training.executor.errors import CheckpointError, ExecutorError
from alto_training.executor.settings import BackboneDtype, ExecutorSettings
from alto_training.executor.settings import Backend as KernelBackend
from alto_training.journal import JOURNAL_FILE, JournalWriter
from alto_training.parent_process import die_with
from alto_training.sharding.errors import RankFailedError
from alto_training.wire import EventTranslator, failure, is_important, job_from_wire, task_state_changed
from alto_training.worker_order import WORK_FILE, WorkerOrder

EXECUTOR_FOLDER = "executor"
LOCK_FILE = "lock"
LOCK_WAIT_S = 30.0
_ABSOLUTE_PATH = re.compile(r"(?<![\w./:-])/(?:[^\s/'\":;,()]+/)+([^\s/'\":;,()]*)")

log = structlog.get_logger("alto.worker")


def main() -> None:
    """Run the assignment in the folder that the command line names."""
    folder = Path(sys.argv[1])
    order = WorkerOrder.read(folder)
    die_with(order.node_process_id)
    configure_logs()
    # Held until this process and its ranks have ended: no two workers ever touch the same task's folder.
    lock = _lock(Path(order.task_folder) / LOCK_FILE)
    work = placement_pb2.TuningWork.FromString((folder / WORK_FILE).read_bytes())
    with JournalWriter(folder / JOURNAL_FILE) as journal:
        last = _train(folder, order, work, journal, lock)
        journal.append(last, durable=True)
    lock.close()


def _train(
    folder: Path, order: WorkerOrder, work: placement_pb2.TuningWork, journal: JournalWriter, lock: TextIO
) -> event_pb2.TaskEvent:
    """Train, and return the event that tells how the task stands. What is not listed here crashes the worker."""
    try:
        store = ArtifactStore(order.artifact_root)
        job = _prepare_job(order, work, store)
        control = NodeControl(CommandReader(folder), list(order.stopped_trial_ids))
        sink = EventSink(EventTranslator(job, order.node_id), journal, store, work.artifact_folder, order.epoch)
        outcome = _run(job, order, sink, control, lock)
        sink.tell_rest(outcome)
        return _last_event(outcome, control.stop_reason)
    except DomainError as error:
        cause = tuning_pb2.Failure(reason=reason_name(error.reason), message=error.message)
    except BaseModelError as error:
        cause = failure(error_pb2.ERROR_REASON_UNKNOWN_BASE_MODEL, str(error))
    except RankFailedError:
        # As when a worker dies: another attempt, perhaps elsewhere, may go better.
        raise
    except ExecutorError as error:
        log.exception("the task cannot be trained")
        cause = failure(error_pb2.ERROR_REASON_EXECUTION_FAILED, str(error))
    cause.message = without_host_paths(cause.message)
    return task_state_changed(work.task_id, tuning_pb2.TASK_STATE_FAILED, cause)


def without_host_paths(message: str) -> str:
    """Return what a tenant may read: of each path on this host only its last part."""
    return _ABSOLUTE_PATH.sub(lambda found: found.group(1), message)


def _prepare_job(order: WorkerOrder, work: placement_pb2.TuningWork, store: ArtifactStore) -> TuningJob:
    folders = [Path(folder) for folder in order.model_folders]
    model = resolve(work.base_model, Path(order.models_root), folders, order.allow_hub)
    cache = Path(order.dataset_cache)
    train = fetch(store, work.train, cache)
    if work.HasField("validation"):
        validation = fetch(store, work.validation, cache)
    else:
        train, validation = split(train, work.validation_fraction or 0.1, cache)
    return job_from_wire(work, model.location, str(train), str(validation))


def _executor_settings(order: WorkerOrder) -> ExecutorSettings:
    default = BackboneDtype.BFLOAT16 if order.device.startswith("cuda") else BackboneDtype.FLOAT32
    return ExecutorSettings(
        device=order.device,
        backbone_dtype=BackboneDtype(order.backbone_dtype) if order.backbone_dtype else default,
        backend=KernelBackend(order.kernel_backend),
        slots=order.slots,
        tokens_per_tick=order.tokens_per_tick,
        threads=order.threads,
        checkpoint_interval_s=order.checkpoint_interval_s,
        cache_dir=Path(order.dataset_cache) / "tokenised",
    )


def _run(
    job: TuningJob, order: WorkerOrder, sink: Callable[[events.Event], None], control: NodeControl, lock: TextIO
) -> events.Outcome:
    # Imported here: a command that comes while torch is being loaded is not lost, and a bad order costs nothing.
    from alto_training.sharding.automatic import train
    from alto_training.sharding.strategy import Strategy, StrategyRecords

    workdir = Path(order.task_folder) / EXECUTOR_FOLDER
    settings, records = _executor_settings(order), StrategyRecords(Path(order.strategy_records))
    strategy = Strategy(order.strategy) if order.strategy else None

    def attempt() -> events.Outcome:
        return train(job, workdir, sink, settings, control, order.places, records, strategy, [lock.fileno()])

    try:
        return attempt()
    except CheckpointError:
        # Every generation is damaged. Nothing can carry on from it, so begin again; what is damaged is kept to look at.
        log.exception("the checkpoints are damaged; starting over")
        shutil.move(workdir, workdir.with_name(f"{workdir.name}.damaged-{secrets.token_hex(4)}"))
        return attempt()


@dataclass
class NodeControl:
    """The executor's ear for its node: trials that were stopped before it began, then commands as they come."""

    commands: CommandReader
    stopped_trial_ids: list[str]
    stop_reason: StopReason | None = None

    def poll(self) -> Command | None:
        """Return the next command, None when there is none."""
        if self.stopped_trial_ids:
            return StopTrial(self.stopped_trial_ids.pop(0))
        command = self.commands.next()
        if command is None:
            return None
        if command["command"] == "stop_trials":
            self.stopped_trial_ids.extend(command["trial_ids"])
            return self.poll()
        self.stop_reason = StopReason(command["reason"])
        return Cancel() if self.stop_reason is StopReason.CANCELLED else Pause()


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


def _lock(path: Path) -> TextIO:
    """Take the task's lock. A worker of a killed node may hold it for the moment that its end takes."""
    file = path.open("w")
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                sys.exit(f"another worker still holds {path}")
            time.sleep(0.1)
        else:
            return file


if __name__ == "__main__":
    main()
