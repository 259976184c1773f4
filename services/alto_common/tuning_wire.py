"""The map between `alto_common.tuning` and its protobuf messages, both ways.

From the wire: a field left out takes the default of the dataclass. To the wire: every field is set, so that a reader
never needs to know a default, and `from_wire(to_wire(x)) == x`. The numbers are not judged here, but by
`TrialConfig.violations`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from alto.v1 import tuning_pb2

from alto_common.tuning import (
    EarlyExit,
    Evaluation,
    LossScope,
    Objective,
    ObjectiveKind,
    Schedule,
    ScheduleKind,
    Trial,
    TrialConfig,
)

_Wire = TypeVar("_Wire", tuning_pb2.TrialConfig, tuning_pb2.EarlyExit)

SCHEDULE_KINDS: dict[tuning_pb2.ScheduleKind.ValueType, ScheduleKind] = {
    tuning_pb2.SCHEDULE_KIND_UNSPECIFIED: ScheduleKind.CONSTANT,
    tuning_pb2.SCHEDULE_KIND_CONSTANT: ScheduleKind.CONSTANT,
    tuning_pb2.SCHEDULE_KIND_LINEAR: ScheduleKind.LINEAR,
    tuning_pb2.SCHEDULE_KIND_COSINE: ScheduleKind.COSINE,
}
OBJECTIVE_KINDS: dict[tuning_pb2.ObjectiveKind.ValueType, ObjectiveKind] = {
    tuning_pb2.OBJECTIVE_KIND_UNSPECIFIED: ObjectiveKind.SFT,
    tuning_pb2.OBJECTIVE_KIND_SFT: ObjectiveKind.SFT,
    tuning_pb2.OBJECTIVE_KIND_DPO: ObjectiveKind.DPO,
}
LOSS_SCOPES: dict[tuning_pb2.LossScope.ValueType, LossScope] = {
    tuning_pb2.LOSS_SCOPE_UNSPECIFIED: LossScope.COMPLETION,
    tuning_pb2.LOSS_SCOPE_COMPLETION: LossScope.COMPLETION,
    tuning_pb2.LOSS_SCOPE_ALL: LossScope.ALL,
}
# Reversed, the last of equal values wins: the named one, not the unspecified zero.
_SCHEDULE_KINDS_TO_WIRE = {kind: wire for wire, kind in SCHEDULE_KINDS.items()}
_OBJECTIVE_KINDS_TO_WIRE = {kind: wire for wire, kind in OBJECTIVE_KINDS.items()}
_LOSS_SCOPES_TO_WIRE = {scope: wire for wire, scope in LOSS_SCOPES.items()}

# Fields that mean the same on both sides and carry their presence on the wire.
_TRIAL_NUMBERS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "learning_rate",
    "lora_plus_ratio",
    "batch_size",
    "gradient_accumulation_steps",
    "epochs",
    "max_steps",
    "max_length",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
)
_EARLY_EXIT_NUMBERS = (
    "warmup_fraction",
    "keep_fraction",
    "window",
    "patience",
    "gap_threshold",
    "slope_threshold",
    "smoothing",
)


def schedule_to_wire(schedule: Schedule) -> tuning_pb2.Schedule:
    """Return the message of a schedule."""
    return tuning_pb2.Schedule(
        kind=_SCHEDULE_KINDS_TO_WIRE[schedule.kind],
        warmup_fraction=schedule.warmup_fraction,
        final_fraction=schedule.final_fraction,
    )


def schedule_from_wire(message: tuning_pb2.Schedule) -> Schedule:
    """Return the schedule of a message."""
    return Schedule(SCHEDULE_KINDS[message.kind], message.warmup_fraction, message.final_fraction)


def trial_config_to_wire(config: TrialConfig) -> tuning_pb2.TrialConfig:
    """Return the message of a configuration, every field set; `max_steps` and `layers` only when they are given."""
    message = tuning_pb2.TrialConfig(
        target_modules=tuning_pb2.TargetModules(names=config.target_modules),
        layers=None if config.layers is None else tuning_pb2.LayerSubset(indices=config.layers),
        schedule=schedule_to_wire(config.schedule),
    )
    return _with_numbers(message, config, _TRIAL_NUMBERS)


def trial_config_from_wire(message: tuning_pb2.TrialConfig, base: TrialConfig | None = None) -> TrialConfig:
    """Return the configuration of a message; what is left out is as in `base`, or takes its default."""
    given: dict[str, object] = _numbers(message, _TRIAL_NUMBERS)
    if message.HasField("target_modules"):
        given["target_modules"] = tuple(message.target_modules.names)
    if message.HasField("layers"):
        given["layers"] = tuple(message.layers.indices)
    if message.HasField("schedule"):
        given["schedule"] = schedule_from_wire(message.schedule)
    # The names and types are those of the fields, by test.
    return replace(base or TrialConfig(), **given)  # type: ignore[arg-type]


def objective_to_wire(objective: Objective) -> tuning_pb2.Objective:
    """Return the message of an objective."""
    return tuning_pb2.Objective(
        kind=_OBJECTIVE_KINDS_TO_WIRE[objective.kind],
        loss_scope=_LOSS_SCOPES_TO_WIRE[objective.loss_scope],
        dpo_beta=objective.dpo_beta,
    )


def objective_from_wire(message: tuning_pb2.Objective) -> Objective:
    """Return the objective of a message."""
    return Objective(
        kind=OBJECTIVE_KINDS[message.kind],
        loss_scope=LOSS_SCOPES[message.loss_scope],
        dpo_beta=message.dpo_beta if message.HasField("dpo_beta") else Objective.dpo_beta,
    )


def early_exit_to_wire(early_exit: EarlyExit) -> tuning_pb2.EarlyExit:
    """Return the message of an early-exit policy and its settings."""
    return _with_numbers(tuning_pb2.EarlyExit(policy=early_exit.policy), early_exit, _EARLY_EXIT_NUMBERS)


def early_exit_from_wire(message: tuning_pb2.EarlyExit) -> EarlyExit:
    """Return the policy and settings of a message; an empty policy is the default one."""
    given: dict[str, object] = _numbers(message, _EARLY_EXIT_NUMBERS)
    if message.policy:
        given["policy"] = message.policy
    return EarlyExit(**given)  # type: ignore[arg-type]  # the names and types are those of the fields, by test


def evaluation_to_wire(evaluation: Evaluation) -> tuning_pb2.Evaluation:
    """Return the message of an evaluation plan."""
    return tuning_pb2.Evaluation(count=evaluation.count, max_examples=evaluation.max_examples)


def evaluation_from_wire(message: tuning_pb2.Evaluation) -> Evaluation:
    """Return the evaluation plan of a message."""
    return Evaluation(
        count=message.count if message.HasField("count") else Evaluation.count,
        max_examples=message.max_examples if message.HasField("max_examples") else None,
    )


def trial_from_wire(trial_id: str, message: tuning_pb2.TrialConfig) -> Trial:
    """Return a trial under its name."""
    return Trial(trial_id, trial_config_from_wire(message))


def _numbers(message: _Wire, names: tuple[str, ...]) -> dict[str, object]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}  # type: ignore[arg-type]


def _with_numbers(message: _Wire, values: object, names: tuple[str, ...]) -> _Wire:
    for name in names:
        value = getattr(values, name)
        if value is not None:
            setattr(message, name, value)
    return message
