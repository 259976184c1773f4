"""Measured cost models, kept on a machine: one small JSON file for each backbone, kind of device and way to compute."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from alto_common.base_models import ModelFacts
from alto_common.cost_model import CostModel

# Raised when the backbone's passes come to hold or to take something else: what was measured before is not used then.
_PASSES = 2


@dataclass(frozen=True)
class CalibrationKey:
    """What a calibration holds for: the model's shape (`shape_of`), the kind of device, and how it computes.

    `threads` are those of the process on a CPU, 0 elsewhere; `backend` is the one asked for, by name or `auto`.
    """

    model_shape: str
    device_kind: str
    threads: int
    backbone_dtype: str
    recompute: bool
    backend: str

    @property
    def file_name(self) -> str:
        """The name of the cache file."""
        return hashlib.sha256(json.dumps([*dataclasses.astuple(self), _PASSES]).encode()).hexdigest() + ".json"


def shape_of(facts: ModelFacts) -> str:
    """Return a hash of what costs depend on in a model; models with other weights of the same shape cost the same."""
    shape = [facts.parameters, facts.vocabulary, sorted(facts.linear_modules.items())]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()


def default_calibrations_folder() -> Path:
    """Return where a machine keeps what it measured: $ALTO_CALIBRATIONS, or ~/.cache/alto/calibrations."""
    return Path(os.environ.get("ALTO_CALIBRATIONS") or "~/.cache/alto/calibrations").expanduser()


def load_calibration(folder: Path, key: CalibrationKey) -> CostModel | None:
    """Return the model saved for `key`, None if there is none that can be read."""
    try:
        model = CostModel(**json.loads((folder / key.file_name).read_text())["model"])
        sound = all(0.0 <= value < math.inf for value in dataclasses.astuple(model))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return model if sound else None


def save_calibration(folder: Path, key: CalibrationKey, model: CostModel) -> None:
    """Keep a calibrated model for `key`; readers see the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"key": dataclasses.asdict(key), "model": dataclasses.asdict(model)}
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        file.write(json.dumps(content))
    os.replace(file.name, folder / key.file_name)
