"""What an executor tells of itself while it runs: frozen records, in the order in which things happened.

Losses are means per target token in nats (SFT) or per pair (DPO). `samples_trained` of a trial counts sequences seen,
those of an effective batch that is not complete too. After a resume, events since the last checkpoint may
be told again with the same content: (task_id, trial_id, step) identifies a measurement.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class TrialState(enum.StrEnum):
    """How a trial ended."""

    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Verdict(enum.StrEnum):
    """What was decided about a trial."""

    KEEP = "keep"
    PAUSE = "pause"
    STOP = "stop"
    REVIVE = "revive"


@dataclass(frozen=True)
class TaskStarted:
    """The backbone is loaded and the first tick is about to run."""

    task_id: str
    device: str
    backbone_dtype: str
    backend: str
    slots: int
    tokens_per_tick: int
    trials: int
    train_examples: int
    validation_examples: int
    backbone_parameters: int
    base_validation_loss: float | None = None
    resumed_from_tick: int | None = None


@dataclass(frozen=True)
class TrialStarted:
    """A trial took a slot: for the first time, or again after it was parked or resumed (`step` above 0)."""

    task_id: str
    trial_id: str
    slot: int
    step: int
    total_steps: int
    samples_trained: int
    trainable_parameters: int


@dataclass(frozen=True)
class TrialPaused:
    """A trial that has begun has no slot: it gave its slot up, or was resumed without one."""

    task_id: str
    trial_id: str
    step: int
    total_steps: int
    samples_trained: int


@dataclass(frozen=True)
class TrialProgress:
    """One optimiser step of one trial; `train_loss` is that of its whole effective batch, before the step."""

    task_id: str
    trial_id: str
    step: int
    total_steps: int
    samples_trained: int
    train_loss: float
    train_loss_smoothed: float
    learning_rate: float
    gradient_norm: float
    tokens_trained: int


@dataclass(frozen=True)
class TrialEvaluated:
    """The validation loss after `step` optimiser steps; `best` says that no earlier one was lower."""

    task_id: str
    trial_id: str
    step: int
    total_steps: int
    samples_trained: int
    validation_loss: float
    train_loss_smoothed: float
    best: bool


@dataclass(frozen=True)
class TrialDecided:
    """A stopping policy or a user decided: the rule, the numbers it saw, the threshold, and a sentence."""

    task_id: str
    trial_id: str
    step: int
    verdict: Verdict
    rule: str
    reason: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None


@dataclass(frozen=True)
class TrialFinished:
    """A trial ended. `adapter_path` is the folder of its best-validation adapter in PEFT format, None without one.

    `samples_saved` counts the sequences of its schedule that were not trained.
    """

    task_id: str
    trial_id: str
    state: TrialState
    reason: str
    step: int
    total_steps: int
    best_step: int | None
    best_validation_loss: float | None
    adapter_path: str | None
    adapter_sha256: str | None
    samples_trained: int
    samples_saved: int


@dataclass(frozen=True)
class MeasuredWork:
    """What an executor has done since it took the task in, all its tasks together, and the seconds each part took.

    `lora_rank_ticks` sums, over training ticks, the lora_rank of the adapters on them. `share_trained` and
    `longest_steps_left` are the task's own: the share of its planned sequences that were trained, earlier attempts
    included, and the optimiser steps left to the trial that has the most left.
    """

    ticks: int
    train_tokens: int
    lora_rank_ticks: int
    training_seconds: float
    evaluation_tokens: int
    evaluation_seconds: float
    checkpoints: int
    checkpoint_seconds: float
    share_trained: float
    longest_steps_left: int


@dataclass(frozen=True)
class TaskProgress:
    """Where the whole task stands. `fraction_done` counts tokens; `seconds_remaining` is None until it can be told."""

    task_id: str
    tick: int
    fraction_done: float
    seconds_remaining: float | None
    tokens_per_s: float
    active_trials: int
    evaluation_seconds: float
    training_seconds: float
    peak_memory_bytes: int
    measured: MeasuredWork
    guest_memory_bytes: int = 0  # left for adapters of tasks that may join


@dataclass(frozen=True)
class TickHalved:
    """Memory ran out: the tick's token budget was halved and the tick is tried again; nothing was lost."""

    task_id: str
    tokens_per_tick_before: int
    tokens_per_tick: int


@dataclass(frozen=True)
class CheckpointWritten:
    """A checkpoint is safe on disk."""

    task_id: str
    tick: int
    path: str
    size_bytes: int
    seconds: float


class TaskState(enum.StrEnum):
    """How a run of the executor ended."""

    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of one task; `trials` is empty of those that have not finished (paused)."""

    task_id: str
    state: TaskState
    trials: tuple[TrialFinished, ...]
    best_trial_id: str | None

    @property
    def best(self) -> TrialFinished | None:
        """The trial with the lowest validation loss, None if none was ever evaluated."""
        return next((trial for trial in self.trials if trial.trial_id == self.best_trial_id), None)


@dataclass(frozen=True)
class TaskLeft:
    """A task is not trained here any more: it has ended, or its user or a `trouble` made it leave.

    Without an `outcome` it never began here. `is_own_trouble` says that it would have the same trouble alone; otherwise
    it may go on alone from its last checkpoint.
    """

    task_id: str
    outcome: Outcome | None
    trouble: str = ""
    is_own_trouble: bool = False


Event = (
    TaskStarted
    | TrialStarted
    | TrialPaused
    | TrialProgress
    | TrialEvaluated
    | TrialDecided
    | TrialFinished
    | TaskProgress
    | TickHalved
    | CheckpointWritten
    | TaskLeft
)
