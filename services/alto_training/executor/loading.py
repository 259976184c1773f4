"""Opening what a job names: its base model, its tokenizer and its datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from alto_common.base_models import resolve
from alto_common.tuning import TuningJob

from alto_training.executor.backbone import Backbone, load_backbone
from alto_training.executor.data_source import DataSource
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
    """Tokenise a job's datasets, or open them where they are cached, and return training and validation data."""
    from transformers import AutoTokenizer

    from alto_training.executor.data import open_dataset

    tokenizer = AutoTokenizer.from_pretrained(locate_base_model(job.base_model))
    train = open_dataset(Path(job.train_path), tokenizer, job.objective, cache_dir)
    validation = open_dataset(Path(job.validation_path), tokenizer, job.objective, cache_dir)
    return train, validation
