"""How far the tasks of an executor are, how fast they go, and where the time goes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass, replace

import torch

from alto_training.executor.backbone import Backbone
from alto_training.executor.events import MeasuredWork, TaskProgress
from alto_training.executor.task_run import TaskRun


@dataclass
class _Counts:
    """What was done, and the seconds of each part."""

    ticks: int = 0
    trained_tokens: int = 0
    lora_rank_ticks: int = 0
    training_s: float = 0.0
    evaluated_tokens: int = 0
    evaluation_s: float = 0.0
    checkpoints: int = 0
    checkpoint_s: float = 0.0


class ProgressMeter:
    """Counts ticks, tokens and seconds of this run, for each task from when it was taken in. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told = float("-inf")
        self._counts = _Counts()
        self._before: dict[str, _Counts] = {}
        self._began: dict[str, tuple[float, float]] = {}  # clock, and the share that was done

    def take_in(self, task_id: str) -> None:
        """Note that a task was taken in: what was done before is no business of its."""
        self._before[task_id] = replace(self._counts)

    def begin(self, task: TaskRun) -> None:
        """Note that a task's first tick here is about to run."""
        self._began[task.task_id] = self._clock(), fraction_done(task)

    def trained(self, tokens: int, lora_ranks: int, seconds: float) -> None:
        """Count one training tick of `tokens`, on which were adapters of `lora_ranks` in sum."""
        self._counts.ticks += 1
        self._counts.trained_tokens += tokens
        self._counts.lora_rank_ticks += lora_ranks
        self._counts.training_s += seconds

    def evaluated(self, tokens: int, seconds: float) -> None:
        """Count tokens that went forward only."""
        self._counts.evaluated_tokens += tokens
        self._counts.evaluation_s += seconds

    def checkpointed(self, seconds: float) -> None:
        """Count one checkpoint."""
        self._counts.checkpoints += 1
        self._counts.checkpoint_s += seconds

    def due(self, interval_s: float) -> bool:
        """Say whether `interval_s` has gone by since this last said yes."""
        now = self._clock()
        if now - self._told < interval_s:
            return False
        self._told = now
        return True

    def measure(
        self, task: TaskRun, tick: int, active_trials: int, backbone: Backbone, guest_memory_bytes: int
    ) -> TaskProgress:
        """Return where a task stands. The time left assumes that no more trials are stopped early."""
        done = fraction_done(task)
        began, done_before = self._began[task.task_id]
        gained = done - done_before
        remaining = (1.0 - done) / gained * (self._clock() - began) if gained > 0.0 else None
        all_of_it, before = self._counts, self._before[task.task_id]
        training_s = all_of_it.training_s - before.training_s
        evaluation_s = all_of_it.evaluation_s - before.evaluation_s
        return TaskProgress(
            task_id=task.task_id,
            tick=tick,
            fraction_done=done,
            seconds_remaining=0.0 if task.done else remaining,
            tokens_per_s=all_of_it.trained_tokens / all_of_it.training_s if all_of_it.training_s > 0.0 else 0.0,
            active_trials=active_trials,
            evaluation_seconds=evaluation_s,
            training_seconds=training_s,
            peak_memory_bytes=peak_memory_bytes(backbone),
            measured=MeasuredWork(
                ticks=all_of_it.ticks - before.ticks,
                train_tokens=all_of_it.trained_tokens - before.trained_tokens,
                lora_rank_ticks=all_of_it.lora_rank_ticks - before.lora_rank_ticks,
                training_seconds=training_s,
                evaluation_tokens=all_of_it.evaluated_tokens - before.evaluated_tokens,
                evaluation_seconds=evaluation_s,
                checkpoints=all_of_it.checkpoints - before.checkpoints,
                checkpoint_seconds=all_of_it.checkpoint_s - before.checkpoint_s,
                share_trained=share_trained(task),
                longest_steps_left=longest_steps_left(task),
            ),
            guest_memory_bytes=guest_memory_bytes,
        )


def fraction_done(task: TaskRun) -> float:
    """Return the share of the task's sequences that are trained or will not be, by its trials' own schedules.

    Of a trial that was cancelled with its task what was trained counts.
    """
    return _share(task, whole=task.finished.keys() - task.cancelled)


def share_trained(task: TaskRun) -> float:
    """Return the share of the task's planned sequences that were really trained."""
    return _share(task, whole=frozenset())


def longest_steps_left(task: TaskRun) -> int:
    """Return the optimiser steps left to the trial that has the most left."""
    left = 0
    for trial in task.job.trials:
        if trial.trial_id not in task.finished:
            run = task.runs.get(trial.trial_id)
            left = max(left, run.total_steps - run.step if run else trial.config.total_steps(len(task.train)))
    return left


def _share(task: TaskRun, whole: Set[str]) -> float:
    total = done = 0
    for trial in task.job.trials:
        samples = trial.config.total_samples(len(task.train))
        total += samples
        if trial.trial_id in whole:
            done += samples
        else:
            done += (task.finished.get(trial.trial_id) or task.runs[trial.trial_id]).samples_trained
    return done / total


def peak_memory_bytes(backbone: Backbone) -> int:
    """Return the largest memory so far: of the accelerator that the backbone is on, or of this process on a CPU."""
    if backbone.device.type == "cuda":
        return torch.cuda.max_memory_allocated(backbone.device) + backbone.weights.uncounted_bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
