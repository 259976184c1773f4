"""The fields of a trial configuration by name: reading them from values that a file or a message holds.

Such values come loosely typed: protobuf's JSON numbers are all floats (16.0 for 16), and YAML reads 2e-4 as a string.
What can only mean one thing is taken as that; anything else is a `FieldTypeError` that says what would be accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from alto_common.tuning import Schedule, ScheduleKind, TrialConfig


class FieldTypeError(ValueError):
    """A value that is not of the field's type; the message is the cure."""


@dataclass(frozen=True)
class ConfigField:
    """How a field reads a loose value, and whether ranges of it make sense."""

    read: Callable[[object], object]
    is_number: bool = False


def _whole(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise FieldTypeError("give a whole number")


def _number(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    raise FieldTypeError("give a number")


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise FieldTypeError("give true or false")


def _whole_or_none(value: object) -> int | None:
    return None if value is None else _whole(value)


def _names(value: object) -> tuple[str, ...]:
    """Read a list of names; one name alone is a list of one."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return tuple(names)
    raise FieldTypeError('give a list of module names, or "all-linear"')


def _indices_or_none(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return tuple(_whole(index) for index in value)
    raise FieldTypeError("give a list of layer indices, or nothing for every layer")


def _schedule_kind(value: object) -> ScheduleKind:
    if isinstance(value, str) and value in list(ScheduleKind):
        return ScheduleKind(value)
    raise FieldTypeError("give one of " + ", ".join(ScheduleKind))


def _schedule(value: object) -> Schedule:
    """Read a schedule: its kind alone, or its fields."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, str):
        return Schedule(_schedule_kind(value))
    if isinstance(value, Mapping) and all(f"schedule.{name}" in CONFIG_FIELDS for name in value):
        read = {str(name): CONFIG_FIELDS[f"schedule.{name}"].read(one) for name, one in value.items()}
        return Schedule(**read)  # type: ignore[arg-type]  # each value is what its own field's reader returned
    raise FieldTypeError("give constant, linear or cosine, or an object with kind, warmup_fraction, final_fraction")


CONFIG_FIELDS: dict[str, ConfigField] = {
    "lora_rank": ConfigField(_whole, is_number=True),
    "lora_alpha": ConfigField(_number, is_number=True),
    "lora_dropout": ConfigField(_number, is_number=True),
    "use_rslora": ConfigField(_truth),
    "target_modules": ConfigField(_names),
    "layers": ConfigField(_indices_or_none),
    "learning_rate": ConfigField(_number, is_number=True),
    "lora_plus_ratio": ConfigField(_number, is_number=True),
    "schedule": ConfigField(_schedule),
    "schedule.kind": ConfigField(_schedule_kind),
    "schedule.warmup_fraction": ConfigField(_number, is_number=True),
    "schedule.final_fraction": ConfigField(_number, is_number=True),
    "batch_size": ConfigField(_whole, is_number=True),
    "gradient_accumulation_steps": ConfigField(_whole, is_number=True),
    "epochs": ConfigField(_number, is_number=True),
    "max_steps": ConfigField(_whole_or_none, is_number=True),
    "max_length": ConfigField(_whole, is_number=True),
    "weight_decay": ConfigField(_number, is_number=True),
    "adam_beta1": ConfigField(_number, is_number=True),
    "adam_beta2": ConfigField(_number, is_number=True),
    "adam_epsilon": ConfigField(_number, is_number=True),
    "max_grad_norm": ConfigField(_number, is_number=True),
    "seed": ConfigField(_whole, is_number=True),
}
WHOLE_NUMBER_FIELDS = frozenset(name for name, one in CONFIG_FIELDS.items() if one.read in (_whole, _whole_or_none))


def with_field(config: TrialConfig, name: str, value: object) -> TrialConfig:
    """Return `config` with the field `name` (a key of `CONFIG_FIELDS`) set; raise `FieldTypeError` for a wrong type."""
    read = CONFIG_FIELDS[name].read(value)
    if "." in name:
        _, inner = name.split(".")
        return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, **{inner: read}))  # type: ignore[arg-type]
    return dataclasses.replace(config, **{name: read})  # type: ignore[arg-type]
