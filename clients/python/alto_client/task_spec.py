"""From a task file to the messages of the contract."""

from __future__ import annotations

from typing import Any

from alto.v1 import tuning_pb2
from google.protobuf import json_format, struct_pb2

from alto_client.task_file import (
    EarlyExitFields,
    EvaluationFields,
    ObjectiveFields,
    ResourceFields,
    SearchFields,
    TaskFile,
    TrialFields,
)

SCHEDULE_KINDS = {
    "constant": tuning_pb2.SCHEDULE_KIND_CONSTANT,
    "linear": tuning_pb2.SCHEDULE_KIND_LINEAR,
    "cosine": tuning_pb2.SCHEDULE_KIND_COSINE,
}
OBJECTIVE_KINDS = {"sft": tuning_pb2.OBJECTIVE_KIND_SFT, "dpo": tuning_pb2.OBJECTIVE_KIND_DPO}
LOSS_SCOPES = {
    None: tuning_pb2.LOSS_SCOPE_UNSPECIFIED,
    "completion": tuning_pb2.LOSS_SCOPE_COMPLETION,
    "all": tuning_pb2.LOSS_SCOPE_ALL,
}


def task_spec(task_file: TaskFile, dataset_id: str, validation_dataset_id: str = "") -> tuning_pb2.TuningTaskSpec:
    """Return what a task file asks for, over datasets that were uploaded."""
    return tuning_pb2.TuningTaskSpec(
        display_name=task_file.name,
        base_model=task_file.base_model,
        dataset_id=dataset_id,
        validation_dataset_id=validation_dataset_id,
        validation_fraction=task_file.validation_fraction,
        objective=objective(task_file.objective),
        search_space=search_space(task_file.search),
        early_exit=early_exit(task_file.early_exit),
        evaluation=evaluation(task_file.evaluation),
        resources=resources(task_file.resources),
        priority=task_file.priority,
        labels=task_file.labels,
    )


def trial_config(fields: TrialFields) -> tuning_pb2.TrialConfig:
    """Return a configuration with the fields that are given."""
    given = fields.model_dump(exclude_none=True, exclude={"schedule", "target_modules", "layers"})
    message = tuning_pb2.TrialConfig(**given)
    if fields.target_modules is not None:
        message.target_modules.CopyFrom(tuning_pb2.TargetModules(names=fields.target_modules))
    if fields.layers is not None:
        message.layers.CopyFrom(tuning_pb2.LayerSubset(indices=fields.layers))
    if fields.schedule is not None:
        message.schedule.CopyFrom(
            tuning_pb2.Schedule(
                kind=SCHEDULE_KINDS[fields.schedule.kind],
                warmup_fraction=fields.schedule.warmup_fraction,
                final_fraction=fields.schedule.final_fraction,
            )
        )
    return message


def search_space(search: SearchFields) -> tuning_pb2.SearchSpace:
    """Return the search space."""
    message = tuning_pb2.SearchSpace(base=trial_config(search.base))
    if search.grid is not None:
        message.grid.dimensions.extend(_dimension(field, values) for field, values in search.grid.items())
    elif search.random is not None:
        message.random.trials = search.random.trials
        message.random.seed = search.random.seed
        dimensions = search.random.dimensions.items()
        message.random.dimensions.extend(_dimension(field, domain) for field, domain in dimensions)
    else:
        message.explicit.configs.extend(trial_config(fields) for fields in search.explicit or ())
    return message


def objective(fields: ObjectiveFields) -> tuning_pb2.Objective:
    """Return the objective."""
    return tuning_pb2.Objective(
        kind=OBJECTIVE_KINDS[fields.kind], loss_scope=LOSS_SCOPES[fields.loss_scope], dpo_beta=fields.dpo_beta
    )


def early_exit(fields: EarlyExitFields) -> tuning_pb2.EarlyExit:
    """Return the stopping policy and its settings."""
    return tuning_pb2.EarlyExit(**fields.model_dump(exclude_none=True))


def evaluation(fields: EvaluationFields) -> tuning_pb2.Evaluation:
    """Return the plan of evaluations."""
    return tuning_pb2.Evaluation(**fields.model_dump(exclude_none=True))


def resources(fields: ResourceFields) -> tuning_pb2.Resources:
    """Return what the task runs on."""
    return tuning_pb2.Resources(**fields.model_dump(exclude_none=True))


def _dimension(field: str, domain: Any) -> tuning_pb2.Dimension:
    if isinstance(domain, dict):
        ((kind, (low, high)),) = domain.items()
        bounds = tuning_pb2.NumericRange(low=low, high=high)
        if kind == "uniform":
            return tuning_pb2.Dimension(field=field, uniform=bounds)
        return tuning_pb2.Dimension(field=field, log_uniform=bounds)
    values = [json_format.ParseDict(value, struct_pb2.Value()) for value in domain]
    return tuning_pb2.Dimension(field=field, values=tuning_pb2.ValueList(values=values))
