"""From a task file to the executor's job, without any service: what admission and a node do, on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alto_client.task_file import TaskFile
from alto_client.task_spec import task_spec
from alto_client.uploading import upload_header

from alto_cli import exit_codes
from alto_cli.failures import CommandError

if TYPE_CHECKING:
    from alto_admission.domain.search import DatasetShape
    from alto_common.tuning import TuningJob


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """Turn the errors of jobs, base models, datasets and the executor into `CommandError`, each with its cure."""
    from alto_common.base_models import BaseModelError, UnknownModelError
    from alto_common.dataset_rows import DatasetError
    from alto_common.errors import DomainError
    from alto_training.early_exit.registry import UnknownPolicyError
    from alto_training.executor.errors import DatasetRefusedError, ExecutorError

    try:
        yield
    except DatasetError as error:
        file = error.file_name or "the dataset"
        raise CommandError(f"{file} cannot be used", *(str(found) for found in error.violations)) from None
    except UnknownPolicyError as error:
        raise CommandError("the search cannot be run", *(str(found) for found in error.violations)) from None
    except DatasetRefusedError as error:
        raise CommandError(error.message, *(str(found) for found in error.violations)) from None
    except UnknownModelError as error:
        raise CommandError(str(error), "fetch a small one: alto models fetch") from None
    except BaseModelError as error:
        raise CommandError(str(error)) from None
    except DomainError as error:
        sentences = [str(found) for found in error.violations]
        raise CommandError("the search cannot be run", *(sentences or [error.message])) from None
    except ExecutorError as error:
        raise CommandError(error.message, error.cure, exit_code=exit_codes.FAILURE) from None


def local_job(task_file: TaskFile, work: Path) -> TuningJob:
    """Return the executor's job for a task file, refusing what admission would refuse before any weight is read.

    What cannot be done raises what `told_to_the_user` tells.
    """
    from alto_admission.domain.search import plan_search, validation_fraction
    from alto_admission.search_wire import expanded
    from alto_common.base_models import inspect
    from alto_common.search_space import MAX_TRIALS
    from alto_common.tuning import TuningJob
    from alto_training.executor.loading import locate_base_model

    spec = task_spec(task_file, dataset_id="local")
    base_model = locate_base_model(task_file.base_model)
    train_shape = _shape(task_file.dataset)
    validation_shape = _shape(task_file.validation) if task_file.validation is not None else None
    facts = inspect(base_model)
    trials = expanded(spec.search_space, MAX_TRIALS, facts.context_length)
    search = plan_search(spec, facts, train_shape, validation_shape, trials)
    train, validation = _rows(task_file, validation_fraction(spec), work)
    return TuningJob(
        task_id=task_file.name,
        base_model=base_model,
        train_path=str(train),
        validation_path=str(validation),
        trials=search.trials,
        objective=search.objective,
        early_exit=search.early_exit,
        evaluation=search.evaluation,
        base_model_name=task_file.base_model,
    )


def _shape(path: Path) -> DatasetShape:
    """Return what admission keeps of a dataset, every line of it checked."""
    from alto_admission.domain.search import DatasetShape
    from alto_common.dataset_rows import scan

    facts = scan(path, file_name=str(path))
    return DatasetShape(facts.format, facts.rows)


def _rows(task_file: TaskFile, validation_fraction: float, work: Path) -> tuple[Path, Path]:
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
    return split(copy, validation_fraction, cache)
