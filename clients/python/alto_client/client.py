"""The client of the public API: every method of AdmissionService under a name that reads well."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from alto.v1 import admission_service_pb2 as messages
from alto.v1 import dataset_pb2, tuning_pb2
from alto.v1.admission_service_pb2_grpc import AdmissionServiceStub

from alto_client import uploading
from alto_client.backoff import OnRetry
from alto_client.connection import Connection
from alto_client.downloading import Download, DownloadedAdapter
from alto_client.task_file import TaskFile
from alto_client.tuning import OnMessage, TuneResult, tune
from alto_client.watching import Watch

Item = TypeVar("Item")
# Counting a dataset's tokens and inspecting a base model take the server longer than other calls.
CHECK_TIMEOUT_S = 300.0


class AltoClient:
    """A connection to ALTO, to be used as a context manager; safe to share between threads.

    `address` is "host:port" or "https://host:port"; `root_certificates` (PEM) are those of a private authority. Calls
    raise `AltoError`; each has a deadline (`timeout_s`, in seconds), and is tried again while the server cannot be
    reached, safely, because each create carries a request_id.
    """

    def __init__(
        self, address: str, api_key: str, *, timeout_s: float = 30.0, root_certificates: bytes | None = None
    ) -> None:
        self._connection = Connection(address, api_key, timeout_s=timeout_s, root_certificates=root_certificates)
        self._stub = AdmissionServiceStub(self._connection.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    # Tasks

    def tune(
        self, task_file: TaskFile, *, output: Path | None = None, on_message: OnMessage | None = None
    ) -> TuneResult:
        """Upload, submit, watch, download: the whole way from a task file to the best adapter.

        `output` takes the place of the file's own; `on_message` sees each message of the watch. Raises `AltoError`.
        """
        return tune(self, task_file, output=output, on_message=on_message)

    def create_task(
        self, spec: tuning_pb2.TuningTaskSpec, *, request_id: str = "", validate_only: bool = False
    ) -> tuning_pb2.TuningTask:
        """Admit a task. Give a `request_id` of your own to have the same task whenever you call again with it."""
        request = messages.CreateTuningTaskRequest(
            request_id=request_id or str(uuid.uuid4()), spec=spec, validate_only=validate_only
        )
        return self._connection.call(self._stub.CreateTuningTask, request, CHECK_TIMEOUT_S).task

    def estimate(self, spec: tuning_pb2.TuningTaskSpec) -> messages.EstimateTuningTaskResponse:
        """Return what a task would take, without admitting it."""
        request = messages.EstimateTuningTaskRequest(spec=spec)
        return self._connection.call(self._stub.EstimateTuningTask, request, CHECK_TIMEOUT_S)

    def get_task(self, task_id: str) -> tuning_pb2.TuningTask:
        """Return one task."""
        return self._connection.call(self._stub.GetTuningTask, messages.GetTuningTaskRequest(task_id=task_id)).task

    def tasks(
        self, *, states: Sequence[tuning_pb2.TaskState.ValueType] = (), labels: Mapping[str, str] | None = None
    ) -> Iterator[tuning_pb2.TuningTask]:
        """Yield the tasks, newest first, of these states and with these labels; fetched page by page."""
        request = messages.ListTuningTasksRequest(states=states, labels=labels)
        return self._pages(self._stub.ListTuningTasks, request, lambda page: page.tasks)

    def cancel_task(self, task_id: str, etag: str = "") -> tuning_pb2.TuningTask:
        """End a task; adapters finished before stay available."""
        request = messages.CancelTuningTaskRequest(task_id=task_id, etag=etag)
        return self._connection.call(self._stub.CancelTuningTask, request).task

    def pause_task(self, task_id: str, etag: str = "") -> tuning_pb2.TuningTask:
        """Free a task's resources at its next checkpoint."""
        request = messages.PauseTuningTaskRequest(task_id=task_id, etag=etag)
        return self._connection.call(self._stub.PauseTuningTask, request).task

    def resume_task(self, task_id: str, etag: str = "") -> tuning_pb2.TuningTask:
        """Queue a paused task again."""
        request = messages.ResumeTuningTaskRequest(task_id=task_id, etag=etag)
        return self._connection.call(self._stub.ResumeTuningTask, request).task

    def watch(
        self,
        task_id: str,
        resume_token: str = "",
        *,
        patience_s: float = 600.0,
        on_disconnect: OnRetry | None = None,
    ) -> Watch:
        """Return the task's messages from `resume_token` on (a snapshot first, without one); see `Watch`."""
        return Watch(
            self._connection, self._stub, task_id, resume_token, patience_s=patience_s, on_disconnect=on_disconnect
        )

    # Trials

    def trials(self, task_id: str) -> Iterator[tuning_pb2.Trial]:
        """Yield a task's trials in the order of its search space."""
        request = messages.ListTrialsRequest(task_id=task_id)
        return self._pages(self._stub.ListTrials, request, lambda page: page.trials)

    def get_trial(self, task_id: str, trial_id: str) -> tuning_pb2.Trial:
        """Return one trial."""
        request = messages.GetTrialRequest(task_id=task_id, trial_id=trial_id)
        return self._connection.call(self._stub.GetTrial, request).trial

    def trial_metrics(self, task_id: str, trial_id: str) -> Iterator[tuning_pb2.TrialMetric]:
        """Yield a trial's curve in the order of its steps."""
        request = messages.ListTrialMetricsRequest(task_id=task_id, trial_id=trial_id)
        return self._pages(self._stub.ListTrialMetrics, request, lambda page: page.metrics)

    def stop_trial(self, task_id: str, trial_id: str) -> tuning_pb2.Trial:
        """Stop one trial; its best adapter stays available."""
        request = messages.StopTrialRequest(task_id=task_id, trial_id=trial_id)
        return self._connection.call(self._stub.StopTrial, request).trial

    # Datasets and base models

    def upload_dataset(
        self,
        path: Path | str,
        *,
        display_name: str = "",
        on_progress: uploading.OnProgress | None = None,
        on_disconnect: OnRetry | None = None,
    ) -> dataset_pb2.Dataset:
        """Upload a dataset file; the same file again gives the same dataset, without sending it again."""
        header = uploading.upload_header(Path(path), display_name)
        upload = uploading.Upload(
            self._connection, self._stub, Path(path), header, on_progress=on_progress, on_disconnect=on_disconnect
        )
        return upload.run()

    def get_dataset(self, dataset_id: str) -> dataset_pb2.Dataset:
        """Return one dataset."""
        return self._connection.call(self._stub.GetDataset, messages.GetDatasetRequest(dataset_id=dataset_id)).dataset

    def datasets(self) -> Iterator[dataset_pb2.Dataset]:
        """Yield the datasets, newest first."""
        return self._pages(self._stub.ListDatasets, messages.ListDatasetsRequest(), lambda page: page.datasets)

    def dataset_usage(self) -> messages.DatasetUsage:
        """Return what the datasets take of the quota, and which uploads are not complete."""
        return self._connection.call(self._stub.ListDatasets, messages.ListDatasetsRequest(page_size=1)).usage

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete a dataset that no unfinished task uses, or give up the unfinished upload of it."""
        self._connection.call(self._stub.DeleteDataset, messages.DeleteDatasetRequest(dataset_id=dataset_id))

    def base_models(self) -> list[dataset_pb2.BaseModel]:
        """Return the base models that the server has."""
        return list(self._connection.call(self._stub.ListBaseModels, messages.ListBaseModelsRequest()).base_models)

    # Adapters

    def download_adapter(
        self,
        task_id: str,
        folder: Path | str,
        trial_id: str = "",
        *,
        replace: bool = False,
        on_progress: uploading.OnProgress | None = None,
        on_disconnect: OnRetry | None = None,
    ) -> DownloadedAdapter:
        """Put a trial's adapter (the task's best, without a `trial_id`) into `folder`, each file checked.

        A folder that holds another adapter is refused (STATE_CONFLICT) unless `replace` is given.
        """
        download = Download(
            self._connection,
            self._stub,
            task_id,
            Path(folder),
            trial_id,
            replace=replace,
            on_progress=on_progress,
            on_disconnect=on_disconnect,
        )
        return download.run()

    def _pages(
        self, method: Callable[..., Any], request: Any, items: Callable[[Any], Iterable[Item]]
    ) -> Iterator[Item]:
        while True:
            page = self._connection.call(method, request)
            yield from items(page)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
