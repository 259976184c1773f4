"""A task and its trials as admission keeps them. Plain data: `story` changes it, the store keeps it column by column.

Times are microseconds since the epoch, UTC. The specification and the configurations are kept as they travelled
(serialised protobuf): they never change, and the contract's rules of compatibility hold for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from alto.v1 import tuning_pb2

from alto_admission.domain.task_states import QUEUED, TERMINAL, State

TRIAL_PENDING = tuning_pb2.TRIAL_STATE_PENDING
TRIAL_RUNNING = tuning_pb2.TRIAL_STATE_RUNNING
TRIAL_PAUSED = tuning_pb2.TRIAL_STATE_PAUSED
TRIAL_SUCCEEDED = tuning_pb2.TRIAL_STATE_SUCCEEDED
TRIAL_STOPPED = tuning_pb2.TRIAL_STATE_STOPPED
TRIAL_FAILED = tuning_pb2.TRIAL_STATE_FAILED
TRIAL_CANCELLED = tuning_pb2.TRIAL_STATE_CANCELLED
TRIAL_TERMINAL = frozenset({TRIAL_SUCCEEDED, TRIAL_STOPPED, TRIAL_FAILED, TRIAL_CANCELLED})


@dataclass(kw_only=True)
class Standing:
    """How a task stands: the little of it that is asked for time and again.

    `epoch` is the highest fencing epoch that reported; `last_event_sequence` counts the events clients see, of which
    those before `earliest_event_sequence` are gone.
    """

    task_id: str
    state: State = QUEUED
    epoch: int = 0
    queue_reason: str = ""
    queue_explanation: str = ""
    predicted_start_us: int | None = None
    predicted_end_us: int | None = None
    last_event_sequence: int = 0
    earliest_event_sequence: int = 1

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in TERMINAL


@dataclass(kw_only=True)
class Task(Standing):
    """One admitted search.

    `revision` grows with every change and is the etag. `reported_sequence` is the last event of the highest epoch that
    is kept.
    """

    tenant: str
    request_id: str
    request_hash: str
    spec: bytes
    base_model: str
    dataset_id: str
    validation_dataset_id: str | None
    trial_count: int
    samples_planned: int
    create_us: int
    revision: int = 1
    start_us: int | None = None
    end_us: int | None = None
    best_trial_id: str | None = None
    best_validation_loss: float | None = None
    base_validation_loss: float | None = None
    failure_reason: str = ""
    failure_message: str = ""
    samples_trained: int = 0
    trials_stopped: int = 0
    fraction_done: float = 0.0
    time_remaining_us: int | None = None
    node_id: str = ""
    reported_sequence: int = 0

    @property
    def etag(self) -> str:
        """The word that changes with every change (AIP-154)."""
        return f"r{self.revision}"

    @property
    def artifact_folder(self) -> str:
        """The folder below the artifact store's root that is the task's own."""
        return f"tenants/{self.tenant}/tasks/{self.task_id}"


@dataclass
class Trial:
    """One configuration of a task and what became of it.

    `state_epoch` and `state_step` tell who set the state and where the trial was then; `train_step` and
    `validation_step` are the last steps with such a measurement. They tell news from a resumed execution's repetition.
    """

    task_id: str
    trial_id: str
    position: int
    config: bytes
    total_steps: int
    state: tuning_pb2.TrialState.ValueType = TRIAL_PENDING
    state_epoch: int = 0
    state_step: int = 0
    step: int = 0
    train_step: int = 0
    validation_step: int = 0
    train_loss_smoothed: float | None = None
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int = 0
    decision: bytes | None = None
    failure_reason: str = ""
    failure_message: str = ""
    adapter: bytes | None = None
    adapter_loss: float | None = None
    adapter_folder: str = ""
    samples_trained: int = 0
    stop_requested: bool = False

    @property
    def ended(self) -> bool:
        """Whether it will not be trained further."""
        return self.state in TRIAL_TERMINAL


@dataclass(frozen=True)
class Metric:
    """One point of a trial's curves; a loss that is not a number is kept as absent."""

    trial_id: str
    step: int
    time_us: int
    train_loss: float | None = None
    train_loss_smoothed: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None


def finite(value: float) -> float | None:
    """Return the number, or None for what is none: the two databases do not agree on NaN."""
    return value if math.isfinite(value) else None
