"""A real gRPC server in this process, with an AdmissionService that keeps everything in memory and breaks on demand."""

import hashlib
import threading
from concurrent import futures

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import dataset_pb2, error_pb2, event_pb2, tuning_pb2
from alto.v1.admission_service_pb2_grpc import AdmissionServiceServicer, add_AdmissionServiceServicer_to_server
from alto_client import AltoClient
from alto_common.errors import DomainError, not_found, unavailable
from alto_common.rpc.status import status_of
from grpc_status import rpc_status

API_KEY = "alto_test_key"
TASK_ID = "task-1"


class MemoryAdmission(AdmissionServiceServicer):
    """Keeps one task's story, uploads and an adapter; each `break_*` makes a stream fail in the middle."""

    def __init__(self):
        self.lock = threading.Lock()
        self.created = {}
        self.requests = []
        self.metadata = []
        self.deadlines = []
        self.snapshot = messages.TuningTaskSnapshot(
            task=tuning_pb2.TuningTask(task_id=TASK_ID, state=tuning_pb2.TASK_STATE_RUNNING)
        )
        self.events = []
        # Of each watch in turn: after how many messages it breaks, and how; a watch beyond the list runs to its end.
        self.break_watches = []
        self.repeat_last_event = False
        self.first_kept_sequence = 1
        self.uploads = {}
        self.datasets = {}
        self.unfinished_uploads = []
        self.break_uploads_after_chunks = []
        self.adapter_files = {}
        self.adapter_trial = "trial-002"
        self.break_downloads_after_chunks = []
        self.corrupt_downloads = 0
        self.unavailable_calls = 0
        self.error = None

    def fail(self, context, error):
        context.abort_with_status(rpc_status.to_status(status_of(error)))

    def note(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines.append(context.time_remaining())
        if f"Bearer {API_KEY}" != self.metadata[-1].get("authorization"):
            self.fail(context, DomainError(error_pb2.ERROR_REASON_CREDENTIAL_INVALID, "no such key"))
        if self.unavailable_calls > 0:
            self.unavailable_calls -= 1
            self.fail(context, unavailable("starting"))
        if self.error is not None:
            self.fail(context, self.error)

    def CreateTuningTask(self, request, context):
        self.note(request, context)
        with self.lock:
            task = self.created.setdefault(
                request.request_id,
                tuning_pb2.TuningTask(task_id=f"task-{len(self.created) + 1}", spec=request.spec, trial_count=2),
            )
        return messages.CreateTuningTaskResponse(task=task)

    def GetTuningTask(self, request, context):
        self.note(request, context)
        if request.task_id != self.snapshot.task.task_id:
            self.fail(context, not_found("task", request.task_id))
        return messages.GetTuningTaskResponse(task=self.snapshot.task)

    def CancelTuningTask(self, request, context):
        self.note(request, context)
        self.snapshot.task.state = tuning_pb2.TASK_STATE_CANCELLING
        return messages.CancelTuningTaskResponse(task=self.snapshot.task)

    def ListTuningTasks(self, request, context):
        self.note(request, context)
        names = [f"task-{number}" for number in range(1, 6)]
        start = int(request.page_token or 0)
        return messages.ListTuningTasksResponse(
            tasks=[tuning_pb2.TuningTask(task_id=name) for name in names[start : start + 2]],
            next_page_token=str(start + 2) if start + 2 < len(names) else "",
        )

    def ListTrials(self, request, context):
        self.note(request, context)
        return messages.ListTrialsResponse(trials=self.snapshot.trials)

    def EstimateTuningTask(self, request, context):
        self.note(request, context)
        return messages.EstimateTuningTaskResponse(trial_count=4, samples_planned=800, basis="prior, never measured")

    def WatchTuningTask(self, request, context):
        self.note(request, context)
        limit, error = self.break_watches.pop(0) if self.break_watches else (None, None)
        for sent, message in enumerate(self._watch(request, context)):
            if sent == limit:
                self.fail(context, error)
            yield message
        if self.events and self.events[-1].HasField("task_state_changed"):
            self.snapshot.task.state = self.events[-1].task_state_changed.state

    def _watch(self, request, context):
        after = int(request.resume_token.removeprefix("after-")) if request.resume_token else 0
        if request.resume_token and after + 1 < self.first_kept_sequence:
            metadata = {"earliest_resume_token": f"after-{self.first_kept_sequence - 1}"}
            reason = error_pb2.ERROR_REASON_RESUME_TOKEN_TOO_OLD
            self.fail(context, DomainError(reason, "those events are gone", metadata=metadata))
        if not request.resume_token:
            after = self.snapshot.task.last_event_sequence
            yield messages.WatchTuningTaskResponse(resume_token=f"after-{after}", snapshot=self.snapshot)
        elif self.repeat_last_event and after:
            yield messages.WatchTuningTaskResponse(resume_token=f"after-{after}", event=self.events[after - 1])
        for event in self.events[after:]:
            yield messages.WatchTuningTaskResponse(
                resume_token=f"after-{event.sequence - 1}", heartbeat=messages.WatchHeartbeat()
            )
            yield messages.WatchTuningTaskResponse(resume_token=f"after-{event.sequence}", event=event)

    def GetDatasetUpload(self, request, context):
        self.note(request, context)
        dataset = self.datasets.get(request.request_id)
        if dataset is None and request.request_id not in self.uploads:
            self.fail(context, not_found("upload", request.request_id))
        kept = self.uploads.get(request.request_id, b"")
        return messages.GetDatasetUploadResponse(committed_bytes=len(kept), dataset=dataset)

    def UploadDataset(self, request_iterator, context):
        header = next(request_iterator).header
        self.note(header, context)
        limit = self.break_uploads_after_chunks.pop(0) if self.break_uploads_after_chunks else None
        kept = bytearray(self.uploads.get(header.request_id, b""))
        for chunks, request in enumerate(request_iterator):
            if chunks == limit:
                self.fail(context, unavailable("going down"))
            if request.chunk.offset != len(kept):
                metadata = {"committed_bytes": str(len(kept))}
                reason = error_pb2.ERROR_REASON_OFFSET_MISMATCH
                self.fail(context, DomainError(reason, "not where the last chunk ended", metadata=metadata))
            kept += request.chunk.data
            self.uploads[header.request_id] = bytes(kept)
        if hashlib.sha256(kept).hexdigest() != header.sha256:
            self.fail(context, DomainError(error_pb2.ERROR_REASON_CONTENT_MISMATCH, "other bytes than announced"))
        dataset = dataset_pb2.Dataset(
            dataset_id=f"dataset-{len(self.datasets) + 1}",
            display_name=header.display_name,
            size_bytes=len(kept),
            row_count=kept.count(b"\n"),
            sha256=header.sha256,
            format=dataset_pb2.DATASET_FORMAT_TEXT,
        )
        self.datasets[header.request_id] = dataset
        return messages.UploadDatasetResponse(dataset=dataset)

    def ListDatasets(self, request, context):
        self.note(request, context)
        used_bytes = sum(dataset.size_bytes for dataset in self.datasets.values())
        usage = messages.DatasetUsage(
            used_bytes=used_bytes, quota_bytes=1 << 30, unfinished_uploads=self.unfinished_uploads
        )
        return messages.ListDatasetsResponse(datasets=self.datasets.values(), usage=usage)

    def DownloadAdapter(self, request, context):
        self.note(request, context)
        files = [
            tuning_pb2.AdapterFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in self.adapter_files.items()
        ]
        adapter = tuning_pb2.Adapter(files=files, step=7, validation_loss=1.25)
        number_of_download = sum(isinstance(one, messages.DownloadAdapterRequest) for one in self.requests)
        limit = self.break_downloads_after_chunks.pop(0) if self.break_downloads_after_chunks else None
        header = messages.AdapterHeader(trial_id=request.trial_id or self.adapter_trial, adapter=adapter)
        yield messages.DownloadAdapterResponse(header=header)
        content = b"".join(self.adapter_files.values())
        # Counted as requests came: one that the client has dropped may never get as far as this line.
        if number_of_download <= self.corrupt_downloads and request.offset == 0:
            content = b"\0" + content[1:]
        for number, offset in enumerate(range(request.offset, len(content), 1000)):
            if number == limit:
                self.fail(context, unavailable("going down"))
            chunk = messages.AdapterChunk(offset=offset, data=content[offset : offset + 1000])
            yield messages.DownloadAdapterResponse(chunk=chunk)


def event(sequence, trial_id="", **payload):
    return event_pb2.TaskEvent(task_id=TASK_ID, sequence=sequence, trial_id=trial_id, **payload)


def story_of_a_search():
    """Two trials: one is stopped, the other becomes the best; then the task ends."""
    running = event_pb2.TrialStateChanged(state=tuning_pb2.TRIAL_STATE_RUNNING, total_steps=10)

    def measured(step, train, validation=None):
        metric = tuning_pb2.TrialMetric(step=step, train_loss_smoothed=train, validation_loss=validation)
        return event_pb2.TrialMeasured(metric=metric, total_steps=10, samples_trained=step * 4)

    decision = tuning_pb2.StoppingDecision(
        verdict=tuning_pb2.VERDICT_STOP, policy="paper", rule="underperformance", reason="1.9 is number 2 of 2", step=5
    )
    payloads = [
        ("", {"task_queued": event_pb2.TaskQueued(queue={"explanation": "Every place is in use."})}),
        ("", {"task_state_changed": event_pb2.TaskStateChanged(state=tuning_pb2.TASK_STATE_RUNNING)}),
        ("", {"execution_started": event_pb2.ExecutionStarted(node_id="n1", device="cpu", base_validation_loss=2.5)}),
        ("trial-001", {"trial_state_changed": running}),
        ("trial-002", {"trial_state_changed": running}),
        ("trial-001", {"trial_measured": measured(5, 2.0, 1.9)}),
        ("trial-002", {"trial_measured": measured(5, 1.8, 1.5)}),
        ("", {"task_progressed": event_pb2.TaskProgressed(fraction_done=0.5, tokens_per_second=1234.5)}),
        ("trial-001", {"trial_decided": event_pb2.TrialDecided(decision=decision)}),
        (
            "trial-001",
            {"trial_state_changed": event_pb2.TrialStateChanged(state=tuning_pb2.TRIAL_STATE_STOPPED, step=5)},
        ),
        ("trial-002", {"trial_measured": measured(10, 1.2, 1.25)}),
        (
            "trial-002",
            {"trial_state_changed": event_pb2.TrialStateChanged(state=tuning_pb2.TRIAL_STATE_SUCCEEDED, step=10)},
        ),
        ("", {"task_state_changed": event_pb2.TaskStateChanged(state=tuning_pb2.TASK_STATE_SUCCEEDED)}),
    ]
    return [event(number, trial_id, **payload) for number, (trial_id, payload) in enumerate(payloads, start=1)]


def two_trials():
    return [
        tuning_pb2.Trial(
            trial_id=f"trial-00{number}",
            config=tuning_pb2.TrialConfig(lora_rank=8, learning_rate=rate),
            state=tuning_pb2.TRIAL_STATE_PENDING,
        )
        for number, rate in ((1, 1e-4), (2, 5e-4))
    ]


@pytest.fixture
def admission():
    """The service, to be told how to behave and asked what it saw."""
    service = MemoryAdmission()
    service.events = story_of_a_search()
    service.snapshot.trials.extend(two_trials())
    return service


@pytest.fixture
def address(admission):
    """Where the service listens."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    add_AdmissionServiceServicer_to_server(admission, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def client(address):
    """A client of the service."""
    with AltoClient(address, API_KEY) as client:
        yield client


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Backoff without the time it takes."""
    monkeypatch.setattr("alto_client.backoff.sleep", lambda _seconds: None)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """A home folder of the test's own, and no server named by the environment."""
    home = tmp_path / "home"
    monkeypatch.setenv("ALTO_HOME", str(home))
    for name in ("ALTO_SERVER", "ALTO_API_KEY", "ALTO_ROOT_CERTIFICATES"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def search():
    """The events of a whole search and the trials it has."""
    return story_of_a_search(), two_trials()
