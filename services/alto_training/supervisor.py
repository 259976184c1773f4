"""One assignment from beginning to end: its folder, its worker process, its reports, and the word on how it ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import structlog
from alto.v1 import error_pb2, event_pb2, placement_pb2, tuning_pb2
from alto_common.errors import reason_name

from alto_training.assignments import Ending, EndKind, Held, Progress, StopReason
from alto_training.control import write_command
from alto_training.folders import AssignmentFolders
from alto_training.journal import (
    JOURNAL_FILE,
    JournalWriter,
    Record,
    read_acknowledged,
    read_journal,
)
from alto_training.reporter import RefusedError, Reporter, StaleEpochError, UnknownTaskError
from alto_training.settings import SERVICE_TOKEN_VARIABLE
from alto_training.worker_order import (
    LOG_FILE,
    MODEL_MISSING_STATUS,
    STORE_UNREACHABLE_STATUS,
    TAKEN_IN_FILE,
    WORK_FILE,
    WorkerOrder,
)

FOLLOW_S = 0.25
FOLLOWED_AT_ONCE = 2000
LOG_TAIL_BYTES = 2000
FINAL_STATES = (tuning_pb2.TASK_STATE_SUCCEEDED, tuning_pb2.TASK_STATE_FAILED)

log = structlog.get_logger("alto.node")


class Supervisor:
    """Runs one assignment. `run` returns how it ended, None when nobody must be told (another has taken over)."""

    def __init__(
        self,
        held: Held,
        work: placement_pb2.TuningWork,
        order: WorkerOrder,
        folders: AssignmentFolders,
        environment: dict[str, str],
        make_reporter: Callable[[Path, str, int], Reporter],
        stop_grace_s: float,
        host: Supervisor | None = None,
    ) -> None:
        self.held = held
        self.begun_s = time.time()
        self.process_id = 0
        self.worker_gone = asyncio.Event()
        self.worker_crashed = False
        self._host = host
        self._guests: list[Supervisor] = []
        self._is_unshared = False
        self._has_left = asyncio.Event()
        self.events_written = 0
        self._offset = 0
        self.reporter = make_reporter(folders.assignment, held.task_id, held.epoch)
        self.folder = folders.assignment
        self._work = work
        self._order = order
        self._folders = folders
        self._environment = environment
        self._stop_grace_s = stop_grace_s
        self._stop: StopReason | None = None
        self._stop_asked = asyncio.Event()
        self._must_end = asyncio.Event()
        self._stopped_trials = set(order.stopped_trial_ids)

    def stop(self, reason: StopReason) -> bool:
        """Ask for the end: at the next checkpoint, or at once when another may be training the task already.

        Returns whether that changes anything.
        """
        if self._stop in (StopReason.SUPERSEDED, reason):
            return False
        if self._stop is StopReason.LEASE_LOST and reason is not StopReason.SUPERSEDED:
            return False
        if self._stop is not None and reason is StopReason.LEASE_ENDS:
            return False
        self._stop = reason
        self._stop_asked.set()
        if reason.is_immediate and self._host is None:
            self._must_end.set()
        return True

    @property
    def is_cancelled(self) -> bool:
        """Whether the task was cancelled: it will not be trained again."""
        return self._stop is StopReason.CANCELLED

    @property
    def worker_process_id(self) -> int:
        """The process that trains it, its own or its host's; 0 when there is none."""
        return self.process_id if self._host is None else self._host.process_id

    @property
    def takes_guests(self) -> bool:
        """Whether another task may join in its worker: that has one place, and is not on its way out."""
        alone = self._host is None and len(self.held.gpu_indices) == 1
        return alone and self._stop is None and not self.worker_gone.is_set()

    @property
    def is_inside(self) -> bool:
        """Whether a guest was taken into its host's worker and has not left it."""
        return (self.folder / TAKEN_IN_FILE).exists() and _last_state(self.folder) is None

    def take_in(self, guest: Supervisor) -> None:
        """Have the worker take in a guest, whose folder is ready."""
        self._guests.append(guest)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_command(self.folder, "take_in", guest_folder=str(guest.folder))

    def end_worker(self) -> None:
        """End the worker at once, with all that it trains."""
        self._must_end.set()
        self._stop_asked.set()

    def internal_error(self) -> Ending:
        """Return the ending of an assignment that the node itself failed to look after."""
        message = f"node {self._order.node_id} could not look after the task; its log says more"
        return Ending(EndKind.FAILED_RETRIABLE, reason_name(error_pb2.ERROR_REASON_INTERNAL), message)

    def stop_trials(self, trial_ids: tuple[str, ...]) -> None:
        """End some trials."""
        new = [trial_id for trial_id in trial_ids if trial_id not in self._stopped_trials]
        if new:
            self._stopped_trials.update(new)
            write_command(self.folder, "stop_trials", trial_ids=new)

    async def run(self) -> Ending | None:
        """Train and report."""
        # Journals may be long: reading them must not keep the node from its heartbeats.
        finished_before = await asyncio.to_thread(self._prepare)
        reporting = asyncio.create_task(self.reporter.run())
        following = asyncio.create_task(self._follow())
        try:
            crash = None
            if self._stop is not None:
                crash = "it was stopped before it began"
            elif not finished_before:
                host = self._host
                crash = await (self._work_until_end(reporting) if host is None else self._stay_with(host, reporting))
            if self._is_superseded():
                return None
            last = await asyncio.to_thread(self._conclude, crash)
            self.reporter.complete()
            # Of a task that is to go on, or was cancelled, nothing is lost with what admission cannot be told.
            await self._reported_or_superseded(reporting, None if last in FINAL_STATES else self._stop_grace_s)
            # What the last words say of progress goes to placement with the end.
            await asyncio.to_thread(self._read_on)
            return None if self._is_superseded() else await asyncio.to_thread(self._ending, last, crash)
        except StaleEpochError:
            log.warning("a newer assignment has taken over", task_id=self.held.task_id, epoch=self.held.epoch)
            # Placement knows already and passes this over; if it does not, it must place the task again.
            reason = reason_name(error_pb2.ERROR_REASON_EPOCH_STALE)
            return Ending(EndKind.FAILED_RETRIABLE, reason, "admission has seen a newer assignment of the task")
        except UnknownTaskError:
            message = "admission does not know the task"
            return Ending(EndKind.FAILED, reason_name(error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND), message)
        except RefusedError as error:
            log.error("admission refuses a report", task_id=self.held.task_id, epoch=self.held.epoch, error=str(error))
            message = f"admission refused a report of node {self._order.node_id}; that node's log says more"
            return Ending(EndKind.FAILED_RETRIABLE, reason_name(error_pb2.ERROR_REASON_INTERNAL), message)
        finally:
            self.worker_gone.set()
            for task in (reporting, following):
                task.cancel()
                with suppress(asyncio.CancelledError, StaleEpochError, UnknownTaskError, RefusedError):
                    await task

    def _prepare(self) -> bool:
        """Make the attempt's folder; return whether an earlier attempt on this host has finished the task."""
        self._folders.prepare()
        (self.folder / WORK_FILE).write_bytes(self._work.SerializeToString())
        self._order.write(self.folder)
        return carry_over(self._folders.earlier(), self.folder)

    async def _work_until_end(self, reporting: asyncio.Task[None]) -> str | None:
        """Run the worker; return what its end leaves to say when it crashed, None when its journal says all."""
        with (self.folder / LOG_FILE).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "alto_training.worker",
                str(self.folder),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={name: value for name, value in self._environment.items() if name != SERVICE_TOKEN_VARIABLE},
                # A Ctrl-C at the terminal is the node's to handle.
                start_new_session=True,
            )
        self.process_id = process.pid
        exited = asyncio.create_task(process.wait())
        obeying = asyncio.create_task(self._pass_on_stops())
        try:
            # A refused report ends `reporting` early, and with it the worker.
            await asyncio.wait({exited, obeying, reporting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            obeying.cancel()
            ended_here = process.returncode is None
            if ended_here:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
            # Until it is gone, no other worker of the task may begin.
            await asyncio.shield(exited)
            self.process_id = 0
            was_ended = self._must_end.is_set() and self._stop is not None
            self.worker_crashed = process.returncode != 0 and not was_ended
            if self.worker_crashed:
                inside = await asyncio.to_thread(lambda: [guest for guest in self._guests if guest.is_inside])
                self._is_unshared = bool(inside)
            self.worker_gone.set()
        if reporting.done():
            reporting.result()
        told = log.bind(task_id=self.held.task_id, epoch=self.held.epoch)
        if process.returncode == 0:
            if self._stop is not None:
                told.info("worker ended as asked", reason=self._stop.value)
            return None
        if ended_here:
            reason = self._why_ended()
            told.warning("worker ended by its node", reason=reason)
            return f"the worker was ended by its node: {reason}"
        # For operators alone: it speaks of this host. The tenant hears what kind of end it was.
        told.error("the worker crashed", status=process.returncode, log_tail=self._log_tail())
        return _crash_in_words(process.returncode or 0)

    def _why_ended(self) -> str:
        if self._stop is None:
            return "a task that shared it did not stop in time"
        return self._stop.value if self._stop.is_immediate else f"{self._stop.value}, and it did not stop in time"

    async def _stay_with(self, host: Supervisor, reporting: asyncio.Task[None]) -> str | None:
        """Be trained in the host's worker; return what its end leaves to say when this task did not leave before it."""
        if not host.takes_guests:
            return "the worker that it was to share has ended"
        host.take_in(self)
        obeying = asyncio.create_task(self._pass_on_stops())
        leaving = asyncio.create_task(self._has_left.wait())
        ending = asyncio.create_task(host.worker_gone.wait())
        try:
            await asyncio.wait({leaving, ending, obeying, reporting}, return_when=asyncio.FIRST_COMPLETED)
            if not leaving.done() and not ending.done():
                # Nobody wants it trained here any more, and the worker does not let go of it.
                if reporting.done():
                    write_command(self.folder, "stop", reason=StopReason.SUPERSEDED.value)
                    await asyncio.wait({leaving, ending}, timeout=self._stop_grace_s)
                if not leaving.done() and not ending.done():
                    host.end_worker()
                    await asyncio.wait({leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (obeying, leaving, ending):
                task.cancel()
        if reporting.done():
            reporting.result()
        if await asyncio.to_thread(_last_state, self.folder) is not None:
            return None
        self._is_unshared = host.worker_crashed and await asyncio.to_thread(lambda: self.is_inside)
        return "the worker that it shared has ended"

    async def _pass_on_stops(self) -> None:
        """Tell the worker to stop, each time the reason changes; return when it must be ended."""
        while not self._must_end.is_set():
            await self._stop_asked.wait()
            self._stop_asked.clear()
            if self._stop is not None and (self._host is not None or not self._stop.is_immediate):
                write_command(self.folder, "stop", reason=self._stop.value)
                asyncio.get_running_loop().call_later(self._stop_grace_s, self._must_end.set)
            waits = {asyncio.create_task(self._stop_asked.wait()), asyncio.create_task(self._must_end.wait())}
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    def _conclude(self, crash: str | None) -> tuning_pb2.TaskState.ValueType | None:
        """Return the state that the journal ends with; write it when the worker was ended before it could."""
        last = _last_state(self.folder)
        states = {
            StopReason.CANCELLED: tuning_pb2.TASK_STATE_CANCELLED,
            StopReason.PAUSED: tuning_pb2.TASK_STATE_PAUSED,
            StopReason.DRAINED: tuning_pb2.TASK_STATE_QUEUED,
            StopReason.PREEMPTED: tuning_pb2.TASK_STATE_QUEUED,
            StopReason.LEASE_ENDS: tuning_pb2.TASK_STATE_QUEUED,
        }
        if crash is None or last is not None or self._stop not in states:
            return last
        state = states[self._stop]
        event = event_pb2.TaskEvent(
            task_id=self.held.task_id, task_state_changed=event_pb2.TaskStateChanged(state=state)
        )
        event.time.GetCurrentTime()
        with JournalWriter(self.folder / JOURNAL_FILE) as journal:
            journal.append(event, durable=True)
        return state

    def _ending(self, last: tuning_pb2.TaskState.ValueType | None, crash: str | None) -> Ending:
        if last == tuning_pb2.TASK_STATE_SUCCEEDED:
            return Ending(EndKind.COMPLETED)
        if last == tuning_pb2.TASK_STATE_FAILED:
            cause = [
                record.event.task_state_changed.failure
                for record in read_journal(self.folder / JOURNAL_FILE)
                if record.event.HasField("task_state_changed")
            ][-1]
            return Ending(EndKind.FAILED, cause.reason, cause.message)
        if last is not None or self._stop is StopReason.LEASE_LOST:
            return Ending(EndKind.UNSHARED if self._is_unshared else EndKind.STOPPED)
        if self._is_unshared:
            return Ending(EndKind.UNSHARED)
        if self._host is not None:
            return Ending(EndKind.STOPPED)
        message = crash or "the worker ended without a word"
        return Ending(EndKind.FAILED_RETRIABLE, reason_name(error_pb2.ERROR_REASON_EXECUTION_FAILED), message)

    def _is_superseded(self) -> bool:
        return self._stop is StopReason.SUPERSEDED

    async def _superseded(self) -> None:
        while not self._is_superseded():
            self._stop_asked.clear()
            await self._stop_asked.wait()

    async def _reported_or_superseded(self, reporting: asyncio.Task[None], timeout_s: float | None) -> None:
        superseded = asyncio.create_task(self._superseded())
        done, _ = await asyncio.wait({reporting, superseded}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        superseded.cancel()
        if reporting.done():
            reporting.result()
        elif not done:
            told = {"events": self.events_written, "acknowledged": self.reporter.acknowledged}
            log.warning("giving a place back with events unreported", task_id=self.held.task_id, **told)

    async def _follow(self) -> None:
        """Keep up with the journal, whether or not admission can be reached."""
        while True:
            self._read_on()
            await asyncio.sleep(FOLLOW_S)

    def _read_on(self) -> None:
        """Read some of what is new in the journal."""
        records = read_journal(self.folder / JOURNAL_FILE, self._offset, self.events_written)
        for record in islice(records, FOLLOWED_AT_ONCE):
            self._offset, self.events_written = record.end_offset, record.sequence
            if record.event.HasField("task_progressed"):
                self.held.progress = _progress(record.event.task_progressed)
            if record.event.HasField("task_state_changed"):
                self._note_state(record.event.task_state_changed)

    def _note_state(self, changed: event_pb2.TaskStateChanged) -> None:
        if changed.state != tuning_pb2.TASK_STATE_RUNNING:
            self._has_left.set()
        if changed.state == tuning_pb2.TASK_STATE_QUEUED and changed.HasField("failure"):
            # What kept it from going on beside others need not keep it from going on alone.
            self._is_unshared = True

    def _log_tail(self) -> str:
        with (self.folder / LOG_FILE).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip() or "its log is empty"


def _crash_in_words(status: int) -> str:
    """Return what a tenant is told of a worker process that ended with `status` (negative: the signal)."""
    if status == -signal.SIGKILL:
        return "the worker process was killed, as hosts do when memory runs out"
    if status == STORE_UNREACHABLE_STATUS:
        return "the artifact store could not be reached; its node's log says more"
    if status == MODEL_MISSING_STATUS:
        return "its node does not have the base model; that node's log says more"
    if status < 0:
        return f"the worker process crashed with {signal.Signals(-status).name}"
    return f"the worker process ended with status {status}; its node's log says more"


def carry_over(earlier: Path | None, folder: Path) -> bool:
    """Begin a journal with what admission may not have of the one before it; return whether the task is already over.

    The resumed run repeats only what came after its last checkpoint, so an unacknowledged event from before would be
    lost with the old journal. That the earlier attempt paused or was queued again is history, and is left out.
    """
    if earlier is None or (folder / JOURNAL_FILE).exists():
        return _last_state(folder) in FINAL_STATES
    acknowledged = read_acknowledged(earlier)
    is_over = False
    with JournalWriter(folder / JOURNAL_FILE) as journal:
        for record in read_journal(earlier / JOURNAL_FILE):
            is_final = _is_final(record)
            is_over = is_over or is_final
            kind = record.event.WhichOneof("payload")
            if is_final or (record.sequence > acknowledged and kind not in ("task_state_changed", "task_progressed")):
                journal.append(record.event, durable=False)
    return is_over


def _is_final(record: Record) -> bool:
    event = record.event
    return event.HasField("task_state_changed") and event.task_state_changed.state in FINAL_STATES


def _last_state(folder: Path) -> tuning_pb2.TaskState.ValueType | None:
    """Return the state that a journal ends with, None when its last event does not say how the task stands."""
    last = None
    for record in read_journal(folder / JOURNAL_FILE):
        last = record.event
    if last is None or not last.HasField("task_state_changed"):
        return None
    state = last.task_state_changed.state
    return None if state == tuning_pb2.TASK_STATE_RUNNING else state


def _progress(message: event_pb2.TaskProgressed) -> Progress:
    remaining = message.time_remaining
    seconds = remaining.seconds + remaining.nanos / 1e9 if message.HasField("time_remaining") else None
    measured = message.measured.SerializeToString()
    return Progress(message.fraction_done, seconds, message.tokens_per_second, measured, message.guest_memory_bytes)
