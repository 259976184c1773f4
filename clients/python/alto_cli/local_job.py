"""From a task file to the executor's job, without any service: what admission and a node do, on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alto_client.task_file import TaskFile
from alto_client.task_spec import task_spec, trial_config
from alto_client.uploading import upload_header

from alto_cli import exit_codes
from alto_cli.failures import CommandError

if TYPE_CHECKING:
    from alto_common.tuning import TuningJob

DEFAULT_VALIDATION_FRACTION = 0.1


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """Turn the errors of jobs, base models, datasets and the executor into `CommandError`, each with its cure."""
    from alto_common.base_models import BaseModelError, UnknownModelError
    from alto_common.dataset_rows import DatasetError
    from alto_common.errors import DomainError
    from alto_common.search_space import SearchSpaceError
    from alto_training.early_exit.registry import UnknownPolicyError
    from alto_training.executor.errors import DatasetRefusedError, ExecutorError

    try:
        yield
    except (DatasetError, SearchSpaceError, UnknownPolicyError) as error:
        raise CommandError("the search cannot be run", *(str(found) for found in error.violations)) from None
    except DatasetRefusedError as error:
        raise CommandError(error.message, *(str(found) for found in error.violations)) from None
    except UnknownModelError as error:
        raise CommandError(str(error), "fetch a small one: alto models fetch") from None
    except BaseModelError as error:
        raise CommandError(str(error)) from None
    except DomainError as error:
        raise CommandError(error.message) from None
    except ExecutorError as error:
        raise CommandError(error.message, error.cure, exit_code=exit_codes.FAILURE) from None


def local_job(task_file: TaskFile, work: Path) -> TuningJob:
    """Return the executor's job for a task file; what cannot be done raises what `told_to_the_user` tells."""
    from alto_common.dataset_rows import DatasetError, check_objective, scan
    from alto_common.tuning import TuningJob
    from alto_common.tuning_wire import early_exit_from_wire, evaluation_from_wire, objective_from_wire
    from alto_training.executor.loading import locate_base_model

    spec = task_spec(task_file, dataset_id="local")
    objective = objective_from_wire(spec.objective)
    base_model = locate_base_model(task_file.base_model)
    for file in (task_file.dataset, task_file.validation):
        if file is not None and (unfit := check_objective(scan(file).format, objective)):
            raise DatasetError(unfit)
    train, validation = _rows(task_file, work)
    return TuningJob(
        task_id=task_file.name,
        base_model=base_model,
        train_path=str(train),
        validation_path=str(validation),
        trials=_trials(task_file),
        objective=objective,
        early_exit=early_exit_from_wire(spec.early_exit),
        evaluation=evaluation_from_wire(spec.evaluation),
        base_model_name=task_file.base_model,
    )


def _rows(task_file: TaskFile, work: Path) -> tuple[Path, Path]:
    """Return the training and the validation file; made of one, the same every time, when only one is named."""
    if task_file.validation is not None:
        return task_file.dataset, task_file.validation
    from alto_training.datasets import split

    cache = work / "rows"
    cache.mkdir(parents=True, exist_ok=True)
    # A copy under its hash: a file that changed is never mistaken for the one that was split before.
    copy = cache / upload_header(task_file.dataset).sha256
    if not copy.exists():
        aside = copy.with_suffix(".part")
        shutil.copyfile(task_file.dataset, aside)
        aside.replace(copy)
    fraction = task_file.validation_fraction
    return split(copy, DEFAULT_VALIDATION_FRACTION if fraction is None else fraction, cache)


def _trials(task_file: TaskFile) -> Any:
    """Expand the search space, as admission does."""
    from alto_common import search_space
    from alto_common.tuning_wire import trial_config_from_wire

    search = task_file.search
    base = trial_config_from_wire(trial_config(search.base))
    kind: search_space.Kind
    if search.grid is not None:
        kind = search_space.GridSearch(_dimensions(search.grid))
    elif search.random is not None:
        random = search.random
        kind = search_space.RandomSearch(_dimensions(random.dimensions), random.trials, random.seed)
    else:
        configs = (trial_config_from_wire(trial_config(fields), base) for fields in search.explicit or ())
        kind = search_space.ExplicitSearch(tuple(configs))
    return search_space.expand(search_space.SearchSpace(kind, base), field_prefix="search.")


def _dimensions(domains: dict[str, Any]) -> Any:
    from alto_common.search_space import Dimension, LogUniform, Uniform, Values

    def domain(value: Any) -> Values | Uniform | LogUniform:
        if isinstance(value, dict):
            ((name, (low, high)),) = value.items()
            return Uniform(low, high) if name == "uniform" else LogUniform(low, high)
        return Values(tuple(value))

    return tuple(Dimension(field, domain(value)) for field, value in domains.items())
