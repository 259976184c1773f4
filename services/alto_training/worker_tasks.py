"""All tasks of one worker: the one that it was started for, and guests that join it and leave it.

The executor asks it for commands and tells it events; each goes from and to the task that it concerns.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import structlog
from alto.v1 import tuning_pb2

from alto_training.executor import events
from alto_training.executor.control import Cancel, Command, Join, Pause, StopTrial
from alto_training.worker_order import TAKEN_IN_FILE, WorkerOrder
from alto_training.worker_task import WorkerTask, is_untrainable

log = structlog.get_logger("alto.worker")


class WorkerTasks:
    """A `Control` for the executor and the place for its events. When the host leaves, its guests do."""

    def __init__(self, host: WorkerTask, token_cache: Path) -> None:
        self._host = host
        self._token_cache = token_cache
        self._guests: dict[str, WorkerTask] = {}
        self._preparing: list[WorkerTask] = []
        # From the threads that prepare guests: a guest, and what was wrong with it if anything was.
        self._prepared: queue.SimpleQueue[tuple[WorkerTask, Exception | None]] = queue.SimpleQueue()
        self._has_host_left = False
        self._has_closed = False

    def poll(self) -> Command | None:
        """Return the next command, None when there is none; never waits."""
        if self._has_host_left:
            self._has_closed, had_closed = True, self._has_closed
            return None if had_closed else Pause()
        command = self._host.poll()
        while self._host.guest_folders:
            self._begin(self._host.guest_folders.pop(0))
        if command is not None:
            return command
        self._stop_those_not_ready()
        while not self._prepared.empty():
            guest, error = self._prepared.get()
            self._preparing.remove(guest)
            if guest.is_closed:
                continue
            if error is None and guest.job is not None:
                self._guests[guest.task_id] = guest
                return Join(guest.job, guest.workdir)
            if error is not None and is_untrainable(error):
                guest.end(guest.failed(error))
            else:
                guest.end(guest.not_trained(tuning_pb2.TASK_STATE_QUEUED, str(error)))
        return next((command for guest in self._guests.values() if (command := guest.poll()) is not None), None)

    def take(self, event: events.Event) -> None:
        """Take one event of the executor."""
        task = self._host if event.task_id == self._host.task_id else self._guests.get(event.task_id)
        if task is None:
            return
        task.take(event)
        if isinstance(event, events.TaskLeft):
            if task is self._host:
                self._has_host_left = True
            else:
                self._end(self._guests.pop(event.task_id), event)

    def _begin(self, folder: Path) -> None:
        """Begin to take in a guest: in a thread, for its rows may have to come from far, and be tokenised."""
        (folder / TAKEN_IN_FILE).touch()
        try:
            guest = WorkerTask.open(folder, WorkerOrder.read(folder))
        except Exception:
            log.exception("a guest could not be read; it waits until the host ends", folder=str(folder))
            return
        self._preparing.append(guest)
        threading.Thread(target=self._prepare, args=[guest], name=f"guest {guest.task_id}", daemon=True).start()

    def _prepare(self, guest: WorkerTask) -> None:
        from alto_training.executor.loading import open_job_data

        try:
            guest.take_lock()
            job = guest.prepare()
            if self._host.job is None or job.base_model != self._host.job.base_model:
                raise RuntimeError("its base model is not the one that lies here under this name any more")
            open_job_data(job, self._token_cache)
        except Exception as error:
            log.exception("a guest could not be prepared", task_id=guest.task_id)
            self._prepared.put((guest, error))
        else:
            self._prepared.put((guest, None))

    def _stop_those_not_ready(self) -> None:
        """Let go of guests that are asked to stop while they are being prepared."""
        for guest in self._preparing:
            if guest.is_closed:
                continue
            command = guest.poll()
            if isinstance(command, StopTrial):
                guest.stopped_trial_ids.append(command.trial_id)
            elif isinstance(command, Cancel | Pause):
                guest.end(guest.stopped())

    @staticmethod
    def _end(guest: WorkerTask, left: events.TaskLeft) -> None:
        if left.trouble:
            state = tuning_pb2.TASK_STATE_FAILED if left.is_own_trouble else tuning_pb2.TASK_STATE_QUEUED
            guest.end(guest.not_trained(state, left.trouble))
        elif left.outcome is not None:
            guest.end(guest.ended(left.outcome))
