"""The vocabulary of a search: trials, schedules, objectives, early exit. Plain data, checked when made.

This is the one home of what a configuration *means*; `alto_common.tuning_wire` maps it to protobuf, and the executor
trains it. Imports neither grpc, sqlalchemy nor torch.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from alto_common.violations import Violation

MAX_LORA_RANK = 256
# As far as the contract's fields go.
MAX_BATCH = 65536
MAX_COUNT = 2**32 - 1
ALL_LINEAR = "all-linear"


class ScheduleKind(enum.StrEnum):
    """How the learning rate moves after warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class ObjectiveKind(enum.StrEnum):
    """What is minimised."""

    SFT = "sft"
    DPO = "dpo"


class LossScope(enum.StrEnum):
    """Which tokens an SFT loss is taken over."""

    COMPLETION = "completion"
    ALL = "all"


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule over the optimiser steps of one trial.

    The rate rises linearly from 0 over the first `warmup_fraction` of the steps (rounded up to whole steps), then stays
    (constant) or falls to `final_fraction` of its peak at the last step (linear, cosine).
    """

    kind: ScheduleKind = ScheduleKind.CONSTANT
    warmup_fraction: float = 0.0
    final_fraction: float = 0.0

    def multiplier(self, step: int, total_steps: int) -> float:
        """Return the factor on the peak rate for optimiser step `step` (0-based) of `total_steps`."""
        warmup_steps = math.ceil(self.warmup_fraction * total_steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if self.kind is ScheduleKind.CONSTANT:
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        fall = 1.0 - progress if self.kind is ScheduleKind.LINEAR else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.final_fraction + (1.0 - self.final_fraction) * fall


@dataclass(frozen=True)
class TrialConfig:
    """One configuration: everything that decides what one adapter becomes.

    `batch_size` counts sequences a micro-batch and `gradient_accumulation_steps` micro-batches an optimiser step; the
    effective batch is their product and the loss is the mean over all its target tokens. `epochs` may be fractional;
    `max_steps`, when given, takes its place. `max_length` is in tokens. `lora_plus_ratio` is the learning rate of B
    over that of A (LoRA+, arXiv 2402.12354). `max_grad_norm` 0 means no clipping. `layers` None means every layer.
    """

    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    layers: tuple[int, ...] | None = None
    learning_rate: float = 2e-4
    lora_plus_ratio: float = 1.0
    schedule: Schedule = field(default_factory=Schedule)
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    max_length: int = 1024
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def effective_batch_size(self) -> int:
        """Sequences per optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def scaling(self) -> float:
        """The factor on B A x: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)

    def total_samples(self, examples: int) -> int:
        """Return the sequences trained in all steps over a dataset of `examples` rows."""
        if self.max_steps is not None:
            return self.max_steps * self.effective_batch_size
        return max(1, math.ceil(examples * self.epochs))

    def total_steps(self, examples: int) -> int:
        """Return the optimiser steps over a dataset of `examples` rows; a last incomplete batch is a step."""
        return math.ceil(self.total_samples(examples) / self.effective_batch_size)

    def violations(self, field_prefix: str = "") -> list[Violation]:
        """Return what is wrong with the numbers themselves, with the cure; empty when the configuration is sound."""
        found: list[Violation] = []

        def check(ok: bool, name: str, value: object, cure: str) -> None:
            if not ok:
                found.append(Violation(field_prefix + name, value, cure))

        def positive(value: float) -> bool:
            return math.isfinite(value) and value > 0

        check(
            1 <= self.lora_rank <= MAX_LORA_RANK,
            "lora_rank",
            self.lora_rank,
            f"give a whole number from 1 to {MAX_LORA_RANK}",
        )
        check(positive(self.lora_alpha), "lora_alpha", self.lora_alpha, "give a number above 0, such as 2 x lora_rank")
        check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "give a probability in [0, 1)")
        check(
            bool(self.target_modules) and all(self.target_modules),
            "target_modules",
            self.target_modules,
            f'name modules such as "q_proj", or "{ALL_LINEAR}"',
        )
        check(
            self.layers is None
            or (bool(self.layers) and min(self.layers) >= 0 and len(set(self.layers)) == len(self.layers)),
            "layers",
            self.layers,
            "give layer indices from 0, each once, or leave it out for every layer",
        )
        check(positive(self.learning_rate), "learning_rate", self.learning_rate, "give a number above 0, such as 2e-4")
        check(
            positive(self.lora_plus_ratio), "lora_plus_ratio", self.lora_plus_ratio, "give a number above 0; 1 is off"
        )
        check(
            0 <= self.schedule.warmup_fraction <= 1,
            "schedule.warmup_fraction",
            self.schedule.warmup_fraction,
            "give a share of the steps in [0, 1]",
        )
        check(
            0 <= self.schedule.final_fraction <= 1,
            "schedule.final_fraction",
            self.schedule.final_fraction,
            "give a share of the peak rate in [0, 1]",
        )
        check(
            1 <= self.batch_size <= MAX_BATCH,
            "batch_size",
            self.batch_size,
            f"give a whole number of sequences from 1 to {MAX_BATCH}",
        )
        check(
            1 <= self.gradient_accumulation_steps <= MAX_BATCH,
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            f"give a whole number from 1 to {MAX_BATCH}",
        )
        check(positive(self.epochs), "epochs", self.epochs, "give a number above 0")
        check(
            self.max_steps is None or 1 <= self.max_steps <= MAX_COUNT,
            "max_steps",
            self.max_steps,
            f"give 1 to {MAX_COUNT:,}, or leave it out",
        )
        check(2 <= self.max_length <= MAX_COUNT, "max_length", self.max_length, f"give 2 to {MAX_COUNT:,} tokens")
        check(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            self.weight_decay,
            "give 0 or more",
        )
        check(0 <= self.adam_beta1 < 1, "adam_beta1", self.adam_beta1, "give a number in [0, 1)")
        check(0 <= self.adam_beta2 < 1, "adam_beta2", self.adam_beta2, "give a number in [0, 1)")
        check(positive(self.adam_epsilon), "adam_epsilon", self.adam_epsilon, "give a number above 0, such as 1e-8")
        check(
            math.isfinite(self.max_grad_norm) and self.max_grad_norm >= 0,
            "max_grad_norm",
            self.max_grad_norm,
            "give a number above 0, or 0 for no clipping",
        )
        check(0 <= self.seed < 2**63, "seed", self.seed, "give a whole number from 0 to 2^63 - 1")
        return found


@dataclass(frozen=True)
class Objective:
    """What every trial of a task minimises. `dpo_beta` is DPO's inverse temperature (arXiv 2305.18290)."""

    kind: ObjectiveKind = ObjectiveKind.SFT
    loss_scope: LossScope = LossScope.COMPLETION
    dpo_beta: float = 0.1


@dataclass(frozen=True)
class EarlyExit:
    """Which stopping policy judges the trials, and its settings (defaults: arXiv 2604.05426, section on early exit).

    `window` evaluations enter a slope, `patience` evaluations running must agree, `gap_threshold` is validation over
    train loss minus one, `slope_threshold` is in loss per evaluation; at `warmup_fraction` of its steps the best
    `keep_fraction` of the trials by validation loss carry on. `smoothing` is the weight of the newest train loss in the
    exponential moving average.
    """

    policy: str = "paper"
    warmup_fraction: float = 0.05
    keep_fraction: float = 0.25
    window: int = 2
    patience: int = 2
    gap_threshold: float = 0.1
    slope_threshold: float = 0.001
    smoothing: float = 0.3


@dataclass(frozen=True)
class Evaluation:
    """When validation loss is measured: `count` times, at equal fractions of each trial's own steps, the last too."""

    count: int = 20
    max_examples: int | None = None


@dataclass(frozen=True)
class Trial:
    """One configuration under its name within a task; `initial_adapter_path` is a PEFT folder to start from."""

    trial_id: str
    config: TrialConfig
    initial_adapter_path: str | None = None


@dataclass(frozen=True)
class TuningJob:
    """What an executor is asked to do for one task. Paths are local; datasets have been validated before.

    `base_model` is where it lies; `base_model_name` is what the task calls it, where that differs.
    """

    task_id: str
    base_model: str
    train_path: str
    validation_path: str
    trials: tuple[Trial, ...]
    objective: Objective = field(default_factory=Objective)
    early_exit: EarlyExit = field(default_factory=EarlyExit)
    evaluation: Evaluation = field(default_factory=Evaluation)
    base_model_name: str = ""
