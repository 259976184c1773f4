"""How long a task will take, before and while it runs: what the plan is made of."""

from __future__ import annotations

from typing import Protocol

from alto_placement.planner import Duration
from alto_placement.state import Progress, TaskRow, WorkSize

# A training token costs about 4 floating-point operations a weight: forward, and backward for activations alone.
OPERATIONS_PER_TOKEN_AND_WEIGHT = 4.0
# Sustained operations a second of one worker place, before anything has been measured there.
PRIOR_OPERATIONS_PER_S = {"cpu": 3e10}
PRIOR_GPU_OPERATIONS_PER_S = 1e14
# Starting a worker: interpreter, libraries, backbone.
START_S = 15.0
NEWEST_WEIGHT = 0.3


class DurationEstimator(Protocol):
    """Predicts durations, and learns from what nodes measure."""

    def estimate(self, base_model: str, gpu_kind: str, gpus: int, size: WorkSize) -> Duration:
        """Return how long work of this size takes."""
        ...

    def observe(self, task: TaskRow, gpu_kind: str, progress: Progress) -> None:
        """Learn from the measured speed of a running task."""
        ...

    def basis(self, base_model: str, gpu_kind: str) -> str:
        """Return in words what an estimate rests on."""
        ...


class ThroughputEstimator:
    """Work over speed: tokens a second as measured for this backbone on this kind of GPU, else from its weights."""

    def __init__(self) -> None:
        self._tokens_per_s: dict[tuple[str, str], float] = {}

    def estimate(self, base_model: str, gpu_kind: str, gpus: int, size: WorkSize) -> Duration:
        """Return start-up plus work over speed, its interval wide while nothing was measured."""
        measured = self._measured(base_model, gpu_kind)
        rate = measured or self._prior(gpu_kind, size.base_parameters)
        # An evaluation has no backward pass.
        upper_s = START_S + (size.train_tokens + size.evaluation_tokens / 3) / rate
        expected_s = START_S + (upper_s - START_S) * (size.expected_share or 1.0)
        spread = 1.3 if measured else 3.0
        return Duration(expected_s, upper_s, expected_s / spread, expected_s * spread)

    def observe(self, task: TaskRow, gpu_kind: str, progress: Progress) -> None:
        """Move the known speed of this backbone on this kind of GPU towards the measured one."""
        if progress.tokens_per_second > 0:
            key = (task.base_model, gpu_kind)
            known = self._tokens_per_s.get(key, progress.tokens_per_second)
            self._tokens_per_s[key] = known + NEWEST_WEIGHT * (progress.tokens_per_second - known)

    def basis(self, base_model: str, gpu_kind: str) -> str:
        """Return in words what an estimate rests on."""
        measured = self._measured(base_model, gpu_kind)
        if measured:
            return f"{measured:,.0f} training tokens a second, measured for {base_model} on {gpu_kind or 'a node here'}"
        return "the number of weights and the kind of device: nothing has been measured for this base model yet"

    def _measured(self, base_model: str, gpu_kind: str) -> float | None:
        if gpu_kind:
            return self._tokens_per_s.get((base_model, gpu_kind))
        return max((rate for (model, _), rate in self._tokens_per_s.items() if model == base_model), default=None)

    def _prior(self, gpu_kind: str, parameters: int) -> float:
        operations = PRIOR_OPERATIONS_PER_S.get(gpu_kind, PRIOR_GPU_OPERATIONS_PER_S)
        return operations / (OPERATIONS_PER_TOKEN_AND_WEIGHT * max(parameters, 1_000_000))
