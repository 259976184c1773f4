"""Search spaces as they travel, expanded into trials."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from alto.v1 import error_pb2, tuning_pb2
from alto_common import search_space
from alto_common.config_fields import CONFIG_FIELDS
from alto_common.errors import invalid_fields
from alto_common.search_space import Dimension, LogUniform, SearchSpaceError, Uniform, Values
from alto_common.tuning import Trial, TrialConfig
from alto_common.tuning_wire import trial_config_from_wire
from alto_common.violations import Violation
from google.protobuf import struct_pb2

FIELD_PREFIX = "spec.search_space."
_DIMENSION = re.compile(r"^(spec\.search_space\.\w+\.dimensions)\[(\d+)\]")


def expanded(message: tuning_pb2.SearchSpace, max_trials: int, context_length: int) -> tuple[Trial, ...]:
    """Return the trials of a search space over a model of `context_length` tokens.

    A `max_length` that nobody gave is no longer than the model's context. Raises SEARCH_SPACE_INVALID for an empty or
    too large space, and for a value that no configuration can have; it names every field at fault.
    """
    try:
        return search_space.expand(_space(message, context_length), max_trials, FIELD_PREFIX)
    except SearchSpaceError as error:
        named = with_names(message, error.violations)
        raise invalid_fields(named, error_pb2.ERROR_REASON_SEARCH_SPACE_INVALID) from error


def first_indices(message: tuning_pb2.SearchSpace, context_length: int) -> dict[TrialConfig, int]:
    """Return where in the list of an explicit space each configuration is first written; of other spaces nothing."""
    kind = _space(message, context_length).kind
    configs = kind.configs if isinstance(kind, search_space.ExplicitSearch) else ()
    return {config: index for index, config in reversed(list(enumerate(configs)))}


def with_names(message: tuning_pb2.SearchSpace, violations: Sequence[Violation]) -> list[Violation]:
    """Return violations whose paths have a dimension's field for its index: dimensions[lora_rank].values.values[1].

    An index stays where that field is none of a configuration's, or another dimension's too.
    """
    dimensions = message.grid.dimensions if message.HasField("grid") else message.random.dimensions
    names = [dimension.field for dimension in dimensions]

    def name(found: re.Match[str]) -> str:
        own = names[int(found[2])]
        return f"{found[1]}[{own}]" if own in CONFIG_FIELDS and names.count(own) == 1 else found[0]

    return [replace(one, field=_DIMENSION.sub(name, one.field)) for one in violations]


def _space(message: tuning_pb2.SearchSpace, context_length: int) -> search_space.SearchSpace:
    default = TrialConfig(max_length=min(TrialConfig.max_length, context_length))
    base = trial_config_from_wire(message.base, default)
    return search_space.SearchSpace(_kind(message, base), base)


def _kind(message: tuning_pb2.SearchSpace, base: TrialConfig) -> search_space.Kind:
    match message.WhichOneof("kind"):
        case "grid":
            return search_space.GridSearch(tuple(map(_dimension, message.grid.dimensions)))
        case "random":
            dimensions = tuple(map(_dimension, message.random.dimensions))
            return search_space.RandomSearch(dimensions, message.random.trials, message.random.seed)
        case _:
            configs = (trial_config_from_wire(config, base) for config in message.explicit.configs)
            return search_space.ExplicitSearch(tuple(configs))


def _dimension(message: tuning_pb2.Dimension) -> Dimension:
    match message.WhichOneof("domain"):
        case "uniform":
            return Dimension(message.field, Uniform(message.uniform.low, message.uniform.high))
        case "log_uniform":
            return Dimension(message.field, LogUniform(message.log_uniform.low, message.log_uniform.high))
        case _:
            return Dimension(message.field, Values(tuple(map(_value, message.values.values))))


def _value(message: struct_pb2.Value) -> object:
    match message.WhichOneof("kind"):
        case "number_value":
            return message.number_value
        case "string_value":
            return message.string_value
        case "bool_value":
            return message.bool_value
        case "list_value":
            return [_value(item) for item in message.list_value.values]
        case "struct_value":
            return {name: _value(item) for name, item in message.struct_value.fields.items()}
        case _:
            return None
