"""How far the tasks of an executor are, how fast they go, and where the time goes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import torch

from alto_training.executor.events import MeasuredWork, TaskProgress
from alto_training.executor.task_run import TaskRun


class ProgressMeter:
    """Counts ticks, tokens and seconds of this run. `clock` gives seconds; `begin` says that all is ready to train."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._told = float("-inf")
        self._done_at_start: dict[str, float] = {}
        self._ticks = self._trained_tokens = self._lora_rank_ticks = self._evaluated_tokens = self._checkpoints = 0
        self._training_s = self._evaluation_s = self._checkpoint_s = 0.0

    def begin(self) -> None:
        """Note that the first tick is about to run."""
        self._began = self._clock()

    def trained(self, tokens: int, lora_ranks: int, seconds: float) -> None:
        """Count one training tick of `tokens`, on which were adapters of `lora_ranks` in sum."""
        self._ticks += 1
        self._trained_tokens += tokens
        self._lora_rank_ticks += lora_ranks
        self._training_s += seconds

    def evaluated(self, tokens: int, seconds: float) -> None:
        """Count tokens that went forward only."""
        self._evaluated_tokens += tokens
        self._evaluation_s += seconds

    def checkpointed(self, seconds: float) -> None:
        """Count one checkpoint."""
        self._checkpoints += 1
        self._checkpoint_s += seconds

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
        elapsed = self._clock() - self._began
        gained = done - self._done_at_start.setdefault(task.task_id, done)
        remaining = (1.0 - done) / gained * elapsed if gained > 0.0 else None
        return TaskProgress(
            task_id=task.task_id,
            tick=tick,
            fraction_done=done,
            seconds_remaining=0.0 if task.done else remaining,
            tokens_per_s=self._trained_tokens / self._training_s if self._training_s > 0.0 else 0.0,
            active_trials=active_trials,
            evaluation_seconds=self._evaluation_s,
            training_seconds=self._training_s,
            peak_memory_bytes=peak_memory_bytes(device),
            measured=MeasuredWork(
                ticks=self._ticks,
                train_tokens=self._trained_tokens,
                lora_rank_ticks=self._lora_rank_ticks,
                training_seconds=self._training_s,
                evaluation_tokens=self._evaluated_tokens,
                evaluation_seconds=self._evaluation_s,
                checkpoints=self._checkpoints,
                checkpoint_seconds=self._checkpoint_s,
                share_trained=share_trained(task),
                longest_steps_left=longest_steps_left(task),
            ),
        )


def fraction_done(task: TaskRun) -> float:
    """Return the share of the task's sequences that are trained or will not be, by its trials' own schedules."""
    return _share(task, finished_is_whole=True)


def share_trained(task: TaskRun) -> float:
    """Return the share of the task's planned sequences that were really trained."""
    return _share(task, finished_is_whole=False)


def longest_steps_left(task: TaskRun) -> int:
    """Return the optimiser steps left to the trial that has the most left."""
    left = 0
    for trial in task.job.trials:
        if trial.trial_id not in task.finished:
            run = task.runs.get(trial.trial_id)
            left = max(left, run.total_steps - run.step if run else trial.config.total_steps(len(task.train)))
    return left


def _share(task: TaskRun, finished_is_whole: bool) -> float:
    total = done = 0.0
    for trial in task.job.trials:
        run, ended = task.runs.get(trial.trial_id), task.finished.get(trial.trial_id)
        items = (
            run.total_items if run else trial.config.total_steps(len(task.train)) * trial.config.effective_batch_size
        )
        total += items
        if ended is not None:
            done += items if finished_is_whole else ended.samples_trained
        else:
            done += run.samples_trained if run else 0
    return done / total


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory so far: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
