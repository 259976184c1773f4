"""How far the tasks of an executor are, how fast they go, and where the time goes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import torch

from alto_training.executor.events import TaskProgress
from alto_training.executor.task_run import TaskRun


class ProgressMeter:
    """Counts tokens and seconds of this run. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        self._told = float("-inf")
        self._done_at_start: dict[str, float] = {}
        self.training_seconds = 0.0
        self.evaluation_seconds = 0.0
        self.trained_tokens = 0

    def due(self, interval_s: float) -> bool:
        """Say whether `interval_s` has gone by since this last said yes."""
        now = self._clock()
        if now - self._told < interval_s:
            return False
        self._told = now
        return True

    def measure(self, task: TaskRun, tick: int, active_trials: int, device: torch.device) -> TaskProgress:
        """Return where a task stands. The time left assumes that no more trials are stopped early."""
        done = fraction_done(task)
        elapsed = self._clock() - self._started
        gained = done - self._done_at_start.setdefault(task.task_id, done)
        remaining = (1.0 - done) / gained * elapsed if gained > 0.0 else None
        return TaskProgress(
            task_id=task.task_id,
            tick=tick,
            fraction_done=done,
            seconds_remaining=0.0 if task.done else remaining,
            tokens_per_s=self.trained_tokens / self.training_seconds if self.training_seconds > 0.0 else 0.0,
            active_trials=active_trials,
            evaluation_seconds=self.evaluation_seconds,
            training_seconds=self.training_seconds,
            peak_memory_bytes=peak_memory_bytes(device),
        )


def fraction_done(task: TaskRun) -> float:
    """Return the share of the task's sequences that are trained or will not be, by its trials' own schedules."""
    total = done = 0.0
    for trial in task.job.trials:
        run = task.runs.get(trial.trial_id)
        items = (
            run.total_items if run else trial.config.total_steps(len(task.train)) * trial.config.effective_batch_size
        )
        total += items
        done += items if trial.trial_id in task.finished else run.samples_trained if run else 0
    return done / total


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory so far: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
