"""What a request asks for, checked whole before anything is kept: the trials of its search space, fit for its model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from alto.v1 import error_pb2, tuning_pb2
from alto_common import tuning_wire
from alto_common.base_models import ModelFacts, check_targets
from alto_common.dataset_rows import RowFormat, check_chat_template, check_objective
from alto_common.errors import invalid_fields
from alto_common.stopping_policies import policy_names
from alto_common.tuning import MAX_COUNT, EarlyExit, Evaluation, Objective, Trial, TrialConfig
from alto_common.violations import Violation

from alto_admission.domain.work_size import split_rows
from alto_admission.search_wire import FIELD_PREFIX, first_indices

DEFAULT_VALIDATION_FRACTION = 0.1
MAX_VIOLATIONS = 50
# The most that a sum over a thousand trials still holds.
MAX_SAMPLES = 2**50

# A configuration and what is wrong with one of its fields, under the field's own name.
Fault: TypeAlias = tuple[TrialConfig, Violation]


@dataclass(frozen=True)
class DatasetShape:
    """What matters of a dataset for a search."""

    row_format: RowFormat
    rows: int


@dataclass(frozen=True)
class Search:
    """A request that can be trained: its trials and how its rows are divided."""

    trials: tuple[Trial, ...]
    objective: Objective
    early_exit: EarlyExit
    evaluation: Evaluation
    train_rows: int
    validation_rows: int


def plan_search(
    spec: tuning_pb2.TuningTaskSpec,
    facts: ModelFacts,
    train: DatasetShape,
    validation: DatasetShape | None,
    trials: Sequence[Trial],
) -> Search:
    """Return the search that `spec` asks for over `trials`, its expanded search space.

    Raises INVALID_FIELD for what contradicts itself, CONFIGURATION_UNFIT for configurations that the model cannot have;
    each names every field at fault.
    """
    objective = tuning_wire.objective_from_wire(spec.objective)
    early_exit = tuning_wire.early_exit_from_wire(spec.early_exit)
    violations = _policy_violations(early_exit)
    for field, shape in (("spec.dataset_id", train), ("spec.validation_dataset_id", validation)):
        if shape is not None:
            violations += check_objective(shape.row_format, objective, field)
            violations += check_chat_template(shape.row_format, facts.has_chat_template, field)
    if train.rows < 2 and validation is None:
        cure = "give a dataset of at least two rows, or a validation dataset: one row cannot be divided"
        violations.append(Violation("spec.dataset_id", f"{train.rows} row", cure))
    if violations:
        raise invalid_fields(violations)
    train_rows, validation_rows = split_rows(
        train.rows, validation.rows if validation else None, validation_fraction(spec)
    )
    endless = _as_written(spec.search_space, facts.context_length, _endless(trials, train_rows))
    if endless:
        raise invalid_fields(endless)
    unfit = _as_written(spec.search_space, facts.context_length, _unfit(facts, trials))
    if unfit:
        raise invalid_fields(unfit, error_pb2.ERROR_REASON_CONFIGURATION_UNFIT)
    return Search(
        trials=tuple(trials),
        objective=objective,
        early_exit=early_exit,
        evaluation=tuning_wire.evaluation_from_wire(spec.evaluation),
        train_rows=train_rows,
        validation_rows=validation_rows,
    )


def validation_fraction(spec: tuning_pb2.TuningTaskSpec) -> float:
    """Return the share of the rows that is set aside for validation when no dataset is named for it."""
    return spec.validation_fraction if spec.HasField("validation_fraction") else DEFAULT_VALIDATION_FRACTION


def _policy_violations(early_exit: EarlyExit) -> list[Violation]:
    names = policy_names()
    if early_exit.policy in names:
        return []
    return [Violation("spec.early_exit.policy", early_exit.policy, "give one of " + ", ".join(names))]


def _endless(trials: Sequence[Trial], train_rows: int) -> Iterator[Fault]:
    """Yield what makes trials of more steps or samples than can be counted, let alone trained."""
    for trial in trials:
        config = trial.config
        field = "epochs" if config.max_steps is None else "max_steps"
        steps = config.max_steps or train_rows * config.epochs / config.effective_batch_size
        if steps > MAX_COUNT or steps * config.effective_batch_size > MAX_SAMPLES:
            cure = f"give fewer: this makes {steps:.3g} steps of {config.effective_batch_size:,} samples"
            yield config, Violation(field, getattr(config, field), cure)


def _unfit(facts: ModelFacts, trials: Sequence[Trial]) -> Iterator[Fault]:
    """Yield what of the configurations does not fit the model."""
    checked: dict[tuple[object, ...], list[Violation]] = {}
    for trial in trials:
        config = trial.config
        # Configurations that differ only in what the model does not care about are checked once.
        essence = (config.target_modules, config.layers, config.lora_rank, config.max_length)
        if essence not in checked:
            checked[essence] = check_targets(facts, config)
        yield from ((config, fault) for fault in checked[essence])


def _as_written(space: tuning_pb2.SearchSpace, context_length: int, faults: Iterable[Fault]) -> list[Violation]:
    """Return faults under the paths that the request has for their fields, each once; of many the first."""
    faults = list(faults)
    indices = first_indices(space, context_length) if faults else {}
    found: dict[tuple[str, str], Violation] = {}
    for config, fault in faults:
        path = _path(space, indices.get(config), fault.field)
        found.setdefault((path, repr(fault.value)), replace(fault, field=path))
    return list(found.values())[:MAX_VIOLATIONS]


def _path(space: tuning_pb2.SearchSpace, index: int | None, field: str) -> str:
    """Return where the request has `field` of a configuration: at `index` of the list, in a dimension, or the base."""
    kind = space.WhichOneof("kind")
    if kind == "explicit":
        # The stubs know HasField with literal names alone.
        if index is not None and space.explicit.configs[index].HasField(field):  # type: ignore[arg-type]
            return f"{FIELD_PREFIX}explicit.configs[{index}].{field}"
        return f"{FIELD_PREFIX}base.{field}"
    dimensions = space.grid.dimensions if kind == "grid" else space.random.dimensions
    if any(dimension.field == field for dimension in dimensions):
        return f"{FIELD_PREFIX}{kind}.dimensions[{field}]"
    return f"{FIELD_PREFIX}base.{field}"


def complete_config(config: TrialConfig) -> bytes:
    """Return a configuration as it is kept and travels: every field set."""
    return tuning_wire.trial_config_to_wire(config).SerializeToString(deterministic=True)
