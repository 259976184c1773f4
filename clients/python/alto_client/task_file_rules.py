"""The rules of the contract applied to a task file, so that a bad number is found before anything is uploaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import protovalidate
from alto.v1 import tuning_pb2
from google.protobuf.message import Message
from pydantic import ValidationError

from alto_client import task_spec
from alto_client.task_file import ScheduleFields, SearchFields, TaskFile, TrialFields
from alto_client.task_file_problems import cure_of, unknown_key
from alto_client.yaml_lines import Location

Broken = tuple[Location, object, str]

RANGES = ("uniform", "log_uniform")
DIMENSIONS = (
    *(name for name in TrialFields.model_fields if name != "schedule"),
    *(f"schedule.{name}" for name in ScheduleFields.model_fields),
)


def broken_rules(task_file: TaskFile) -> list[Broken]:
    """Return (location, value, cure) of everything in the file that ALTO would refuse, whatever the base model."""
    return [
        *_own_fields(task_file),
        *_rules(task_spec.objective(task_file.objective), ("objective",)),
        *_rules(task_spec.early_exit(task_file.early_exit), ("early_exit",)),
        *_rules(task_spec.evaluation(task_file.evaluation), ("evaluation",)),
        *_rules(task_spec.resources(task_file.resources), ("resources",)),
        *_search(task_file.search),
    ]


def _own_fields(task_file: TaskFile) -> Iterator[Broken]:
    """Check the fields that are the task's own."""
    own = {"display_name": "name", "base_model": "base_model", "validation_fraction": "validation_fraction"}
    spec = tuning_pb2.TuningTaskSpec(
        display_name=task_file.name,
        base_model=task_file.base_model,
        validation_fraction=task_file.validation_fraction,
        labels=task_file.labels,
    )
    for location, value, cure in _rules(spec, ()):
        if location[0] in own:
            yield (own[str(location[0])],), value, cure
        elif location[0] == "labels":
            yield location, value, cure


def _search(search: SearchFields) -> Iterator[Broken]:
    ways = [name for name, way in (("grid", search.grid), ("random", search.random), ("list", search.explicit)) if way]
    if len(ways) != 1:
        given = " and ".join(ways) if ways else "none of them"
        yield ("search",), None, f"give exactly one of grid, random and list, with at least one entry (given: {given})"
    yield from _rules(task_spec.trial_config(search.base), ("search", "base"))
    for field, values in (search.grid or {}).items():
        yield from _values(field, values, ("search", "grid", field))
    for index, fields in enumerate(search.explicit or ()):
        yield from _rules(task_spec.trial_config(fields), ("search", "list", index))
    if search.random is not None:
        if not search.random.dimensions:
            yield ("search", "random"), None, "name at least one dimension, such as lora_rank: [8, 16]"
        for field, domain in search.random.dimensions.items():
            location: Location = ("search", "random", field)
            yield from _range(field, domain, location) if isinstance(domain, dict) else _values(field, domain, location)


def _values(field: str, values: object, location: Location) -> Iterator[Broken]:
    """Check a dimension that is a list of values, each as a value of its field."""
    if field not in DIMENSIONS:
        yield location, None, _unknown_dimension(field)
    elif not isinstance(values, list) or not values:
        yield location, values, f"give a list with at least one value, such as [{_example(values)}]"
    else:
        for index, value in enumerate(values):
            yield from _one_value(field, value, (*location, index))


def _range(field: str, domain: dict[str, Any], location: Location) -> Iterator[Broken]:
    """Check a dimension that is a range of numbers."""
    bounds = next(iter(domain.values()), None)
    if field not in DIMENSIONS:
        yield location, None, _unknown_dimension(field)
    elif len(domain) != 1 or next(iter(domain)) not in RANGES:
        yield location, domain, "give a list of values, {uniform: [low, high]} or {log_uniform: [low, high]}"
    elif (
        not isinstance(bounds, list)
        or len(bounds) != 2
        or not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds)
    ):
        yield location, domain, "give two numbers, [low, high]"
    elif not bounds[0] < bounds[1] or not all(map(math.isfinite, bounds)):
        yield location, bounds, "give the lower number first"
    elif "log_uniform" in domain and bounds[0] <= 0:
        yield location, bounds, "a logarithmic range needs numbers above 0"
    else:
        for bound in bounds:
            yield from _one_value(field, bound, location)


def _one_value(field: str, value: object, location: Location) -> Iterator[Broken]:
    section, _, name = field.rpartition(".")
    try:
        fields = TrialFields.model_validate({section: {name: value}} if section else {name: value})
    except ValidationError as error:
        yield location, value, cure_of(error.errors(include_url=False)[0])
        return
    for _, wrong, cure in _rules(task_spec.trial_config(fields), ()):
        yield location, wrong, cure


def _rules(message: Message, prefix: Location) -> Iterator[Broken]:
    for found in protovalidate.collect_violations(message):
        location = prefix
        for element in found.proto.field.elements if found.proto.field else ():
            if element.field_name not in ("names", "indices"):  # wrapped lists on the wire, plain ones in the file
                location = (*location, str(element.field_name))
            if element.subscript is not None:
                location = (*location, element.subscript.value)
        yield location, found.field_value, str(found.proto.message)


def _unknown_dimension(field: str) -> str:
    if field == "schedule":
        return "vary its parts one by one, such as schedule.kind: [linear, cosine]"
    return unknown_key(field, DIMENSIONS)


def _example(value: object) -> str:
    return str(value) if isinstance(value, int | float | str) and value != "" else "8, 16"
