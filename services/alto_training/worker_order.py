"""What a worker is told when it starts: one JSON file beside the assignment, written by its node; how it may end."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from alto_training.sharding.places import Places

ORDER_FILE = "order.json"
WORK_FILE = "work.pb"
LOG_FILE = "worker.log"
# Made by the worker of a guest's host when it begins to take the guest in.
TAKEN_IN_FILE = "taken_in"
# How a worker ends whose host does not have the base model, and one that could not reach the artifact store.
MODEL_MISSING_STATUS = os.EX_OSFILE
STORE_UNREACHABLE_STATUS = os.EX_UNAVAILABLE


@dataclass(frozen=True)
class WorkerOrder:
    """Where things are and how to train. `work` itself (TuningWork) lies beside it as protobuf.

    `threads` are those of each place. `strategy` is how the backbone lies on several places, empty when that is chosen
    by what was measured; `strategy_records` is the file of it.
    """

    node_id: str
    node_process_id: int
    epoch: int
    task_folder: str
    artifact_root: str
    dataset_cache: str
    models_root: str
    model_folders: tuple[str, ...]
    allow_hub: bool
    device: str
    places: Places
    strategy: str
    strategy_records: str
    backbone_dtype: str
    kernel_backend: str
    slots: int | None
    tokens_per_tick: int | None
    threads: int | None
    checkpoint_interval_s: float
    stopped_trial_ids: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the order into the assignment's folder."""
        (folder / ORDER_FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the order of an assignment."""
        fields = json.loads((folder / ORDER_FILE).read_text())
        for name in ("model_folders", "stopped_trial_ids"):
            fields[name] = tuple(fields[name])
        places = fields["places"]
        fields["places"] = Places(**places | {"devices": tuple(places["devices"])})
        return cls(**fields)
