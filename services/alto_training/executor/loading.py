"""Opening what a job names: its base model, its tokenizer and its datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from alto_common.base_models import UnusableModelError, load_tokenizer, resolve, text_vocabulary
from alto_common.dataset_rows import DatasetError
from alto_common.tuning import TuningJob
from alto_common.violations import Violation

from alto_training.executor.backbone import Backbone, load_backbone
from alto_training.executor.data_source import DataSource
from alto_training.executor.errors import DatasetRefusedError
from alto_training.executor.settings import BackboneDtype, ExecutorSettings

# From a job and a folder for caches to its training and validation data.
OpenData = Callable[[TuningJob, Path], tuple[DataSource, DataSource]]

_DTYPES = {BackboneDtype.FLOAT32: torch.float32, BackboneDtype.BFLOAT16: torch.bfloat16}


def locate_base_model(name_or_folder: str) -> str:
    """Return the folder of a base model, or the hub name it has when no folder of ours holds it."""
    if Path(name_or_folder).is_dir():
        return name_or_folder
    return resolve(name_or_folder, allow_hub=True).location


def load_job_backbone(base_model: str, settings: ExecutorSettings) -> Backbone:
    """Load the backbone on the device and in the number format of the settings."""
    location = locate_base_model(base_model)
    if settings.backbone_dtype is BackboneDtype.NF4:
        # Products of a backbone in 4 bits are made in what the device is good at.
        dtype = torch.float32 if torch.device(settings.device).type == "cpu" else torch.bfloat16
        return load_backbone(location, dtype, settings.device, in_nf4=True)
    return load_backbone(location, _DTYPES[settings.backbone_dtype], settings.device)


def open_job_data(job: TuningJob, cache_dir: Path) -> tuple[DataSource, DataSource]:
    """Tokenise a job's datasets, or open them where they are cached, and return training and validation data.

    Raises `DatasetRefusedError` for rows that the model cannot be trained on, `UnusableModelError` for a tokenizer that
    cannot be loaded.
    """
    from alto_training.executor.data import open_dataset
    from alto_training.executor.data.segments import TokenizerError

    location = locate_base_model(job.base_model)
    tokenizer, vocabulary = load_tokenizer(location), text_vocabulary(location)

    def opened(which: str, path: str) -> DataSource:
        try:
            data = open_dataset(Path(path), tokenizer, job.objective, cache_dir)
        except DatasetError as error:
            raise _refused(which, error.violations) from error
        except TokenizerError as error:
            raise UnusableModelError(Path(location).name, "has no usable tokenizer", str(error)) from error
        if (stray := data.first_token_beyond(vocabulary)) is not None:
            row, token = stray
            # A GPU answers an embedding that there is not with an error that ends the process.
            cure = (
                f"the model has {vocabulary:,} tokens and its tokenizer makes others: give the tokenizer it came with"
            )
            raise _refused(which, [Violation(f"line[{data.line(row)}]", f"token {token}", cure)])
        return data

    return opened("training", job.train_path), opened("validation", job.validation_path)


def _refused(which: str, violations: Sequence[Violation]) -> DatasetRefusedError:
    cure = "; ".join(str(violation) for violation in violations)
    return DatasetRefusedError(f"the {which} rows cannot be used with this base model", cure, violations)
