"""Search spaces as they travel, expanded into trials."""

from __future__ import annotations

from alto.v1 import error_pb2, tuning_pb2
from alto_common import search_space
from alto_common.errors import invalid_fields
from alto_common.search_space import Dimension, LogUniform, SearchSpaceError, Uniform, Values
from alto_common.tuning import Trial, TrialConfig
from alto_common.tuning_wire import trial_config_from_wire
from google.protobuf import struct_pb2

FIELD_PREFIX = "spec.search_space."
# Violations of these fields themselves are about the space: empty, or too large. All others are about one value.
_SPACE_FIELDS = ("dimensions", "configs", "trials", "values")


def expanded(message: tuning_pb2.SearchSpace, max_trials: int) -> tuple[Trial, ...]:
    """Return the trials of a search space.

    Raises SEARCH_SPACE_INVALID for an empty or too large one, INVALID_FIELD for a value that no configuration can have;
    both name every field at fault.
    """
    base = trial_config_from_wire(message.base)
    space = search_space.SearchSpace(_kind(message, base), base)
    try:
        return search_space.expand(space, max_trials, FIELD_PREFIX)
    except SearchSpaceError as error:
        of_space = all(violation.field.endswith(_SPACE_FIELDS) for violation in error.violations)
        reason = error_pb2.ERROR_REASON_SEARCH_SPACE_INVALID if of_space else error_pb2.ERROR_REASON_INVALID_FIELD
        raise invalid_fields(error.violations, reason) from error


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
