"""From a task file to the best adapter in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alto.v1 import admission_service_pb2 as messages
from alto.v1 import tuning_pb2

from alto_client.downloading import DownloadedAdapter
from alto_client.task_file import TaskFile
from alto_client.task_spec import task_spec

if TYPE_CHECKING:
    from alto_client.client import AltoClient

OnMessage = Callable[[messages.WatchTuningTaskResponse], None]


@dataclass(frozen=True)
class TuneResult:
    """What a search came to: the task in its last state, its trials, and the best adapter, None without one."""

    task: tuning_pb2.TuningTask
    trials: tuple[tuning_pb2.Trial, ...]
    downloaded: DownloadedAdapter | None

    @property
    def succeeded(self) -> bool:
        """Whether every trial ended and there is a best adapter."""
        return self.task.state == tuning_pb2.TASK_STATE_SUCCEEDED

    @property
    def best_validation_loss(self) -> float | None:
        """The lowest validation loss of all trials."""
        return self.task.best_validation_loss if self.task.HasField("best_validation_loss") else None

    @property
    def adapter_folder(self) -> Path | None:
        """Where the best adapter lies."""
        return self.downloaded.folder if self.downloaded else None


def tune(
    client: AltoClient, task_file: TaskFile, *, output: Path | None = None, on_message: OnMessage | None = None
) -> TuneResult:
    """Upload the datasets of `task_file`, submit it, watch it to its end, and download the best adapter."""
    dataset = client.upload_dataset(task_file.dataset)
    validation = client.upload_dataset(task_file.validation) if task_file.validation else None
    spec = task_spec(task_file, dataset.dataset_id, validation.dataset_id if validation else "")
    task_id = client.create_task(spec).task_id
    for message in client.watch(task_id):
        if on_message is not None:
            on_message(message)
    task = client.get_task(task_id)
    downloaded = None
    if task.best_trial_id:
        # The folder is the task file's own: a search that is run again takes the place of the one before.
        downloaded = client.download_adapter(task_id, output or task_file.output, replace=True)
    return TuneResult(task, tuple(client.trials(task_id)), downloaded)
