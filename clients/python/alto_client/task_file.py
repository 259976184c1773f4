"""The task file: a search written down in YAML, as checked values.

`load_task_file` refuses what it does not know and names the line, the key, the value and the cure of everything it
refuses. What numbers may be is written once, in the contract (protovalidate), and checked from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from alto_client.task_file_problems import Problem, TaskFileError, problems_of
from alto_client.yaml_lines import Location, YamlDocument, YamlError, read_yaml

__all__ = ["TaskFile", "TaskFileError", "load_task_file"]

Count: TypeAlias = Annotated[int, Field(ge=1, lt=2**32)]
Index: TypeAlias = Annotated[int, Field(ge=0, lt=2**32)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
ScheduleKindName: TypeAlias = Literal["constant", "linear", "cosine"]


def _shorthand(key: str) -> BeforeValidator:
    """Let a bare word stand for a mapping with one key: `objective: sft` for `objective: {kind: sft}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


_one_or_more = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class Section(BaseModel):
    """A mapping of the file: unknown keys refused, types taken as they are written."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ScheduleFields(Section):
    """Learning-rate schedule."""

    kind: ScheduleKindName = "constant"
    warmup_fraction: float = 0.0
    final_fraction: float = 0.0


class TrialFields(Section):
    """Fields of a configuration; what is left out takes ALTO's default."""

    lora_rank: Count | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    use_rslora: bool | None = None
    target_modules: Annotated[list[str] | None, _one_or_more] = None
    layers: list[Index] | None = None
    learning_rate: float | None = None
    lora_plus_ratio: float | None = None
    schedule: Annotated[ScheduleFields | None, _shorthand("kind")] = None
    batch_size: Count | None = None
    gradient_accumulation_steps: Count | None = None
    epochs: float | None = None
    max_steps: Count | None = None
    max_length: Count | None = None
    weight_decay: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_epsilon: float | None = None
    max_grad_norm: float | None = None
    seed: Seed | None = None


class RandomFields(BaseModel):
    """Random draws: how many, from which seed; every other key is a dimension."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    trials: Count
    seed: Seed = 0

    @property
    def dimensions(self) -> dict[str, Any]:
        """The dimensions by field: a list of values, {uniform: [low, high]} or {log_uniform: [low, high]}."""
        return dict(self.model_extra or {})


class SearchFields(Section):
    """Which configurations are tried: what they share, and exactly one of the three ways to make them."""

    base: TrialFields = Field(default_factory=TrialFields)
    grid: dict[str, Any] | None = None
    random: RandomFields | None = None
    explicit: list[TrialFields] | None = Field(default=None, alias="list")


class ObjectiveFields(Section):
    """What is minimised."""

    kind: Literal["sft", "dpo"] = "sft"
    loss_scope: Literal["completion", "all"] | None = None
    dpo_beta: float | None = None


class EarlyExitFields(Section):
    """Which stopping policy judges the trials, and its settings."""

    policy: str = ""
    warmup_fraction: float | None = None
    keep_fraction: float | None = None
    window: Count | None = None
    patience: Count | None = None
    gap_threshold: float | None = None
    slope_threshold: float | None = None
    smoothing: float | None = None


class EvaluationFields(Section):
    """When validation loss is measured."""

    count: Count | None = None
    max_examples: Count | None = None


class ResourceFields(Section):
    """What the task runs on."""

    gpus: Count | None = None
    gpu_kind: str = ""


class TaskFile(Section):
    """One search. Paths are relative to the file's folder in YAML, and complete once loaded.

    `output` is alto-output/ and the file's name without its ending, unless the file names another folder.
    """

    name: str = ""
    base_model: str
    dataset: Annotated[Path, Field(strict=False)]
    validation: Annotated[Path | None, Field(strict=False)] = None
    validation_fraction: float | None = None
    objective: Annotated[ObjectiveFields, _shorthand("kind")] = Field(default_factory=ObjectiveFields)
    search: SearchFields
    early_exit: Annotated[EarlyExitFields, _shorthand("policy")] = Field(default_factory=EarlyExitFields)
    evaluation: EvaluationFields = Field(default_factory=EvaluationFields)
    resources: ResourceFields = Field(default_factory=ResourceFields)
    priority: int = Field(default=0, ge=-100, le=100)
    labels: dict[str, str] = Field(default_factory=dict)
    output: Annotated[Path, Field(strict=False)] = Path("alto-output")


def load_task_file(path: Path | str) -> TaskFile:
    """Return the checked content of a task file, its paths made complete; raise `TaskFileError` with all problems."""
    path = Path(path)
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskFileError(path, [Problem(0, "", None, f"it cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError:
        raise TaskFileError(path, [Problem(0, "", None, "it is not UTF-8 text: save it as UTF-8")]) from None
    except YamlError as error:
        raise TaskFileError(path, [Problem(error.line, "", None, str(error))]) from None
    try:
        task_file = TaskFile.model_validate(document.data)
    except ValidationError as error:
        raise TaskFileError(path, problems_of(error, document, _known_keys)) from None
    folder = path.resolve().parent
    # Searches that lie side by side do not take each other's place.
    output = task_file.output if "output" in task_file.model_fields_set else task_file.output / path.stem
    task_file = task_file.model_copy(
        update={
            "name": task_file.name or path.stem,
            "dataset": folder / task_file.dataset.expanduser(),
            "validation": folder / task_file.validation.expanduser() if task_file.validation else None,
            "output": folder / output.expanduser(),
        }
    )
    _check(path, task_file, document)
    return task_file


def _check(path: Path, task_file: TaskFile, document: YamlDocument) -> None:
    """Raise for what only the whole shows: sections that exclude each other, files that are not there, bad numbers."""
    # The rules of the contract are a slow import that a `--help` must not pay for.
    from alto_client.task_file_rules import broken_rules

    found: list[tuple[Location, object, str]] = []
    for key in ("dataset", "validation"):
        file: Path | None = getattr(task_file, key)
        if file is not None and not file.is_file():
            found.append(((key,), str(file), "there is no such file: give its path relative to this task file"))
    if task_file.validation is not None and task_file.validation_fraction is not None:
        cure = "give either validation or validation_fraction, not both"
        found.append((("validation_fraction",), task_file.validation_fraction, cure))
    found.extend(broken_rules(task_file))
    if found:
        raise TaskFileError(path, [Problem.at(document, *problem) for problem in found])


def _known_keys(location: Location) -> Mapping[str, object]:
    """Return the keys that the mapping at `location` may have."""
    sections: dict[Location, type[BaseModel]] = {
        (): TaskFile,
        ("search",): SearchFields,
        ("search", "base"): TrialFields,
        ("search", "base", "schedule"): ScheduleFields,
        ("objective",): ObjectiveFields,
        ("early_exit",): EarlyExitFields,
        ("evaluation",): EvaluationFields,
        ("resources",): ResourceFields,
    }
    section = sections.get(location)
    if section is None and location[:2] == ("search", "list"):
        section = ScheduleFields if location[-1] == "schedule" else TrialFields
    return {field.alias or name: None for name, field in section.model_fields.items()} if section else {}
