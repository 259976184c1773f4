"""A real admission process that is killed again and again while events stream through it: nothing lost or repeated."""

import asyncio
import hashlib
import os
import signal
import sys
import uuid

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import admission_service_pb2_grpc, report_service_pb2_grpc, tuning_pb2
from alto_common.rpc.channel import bearer_metadata
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import free_ports

from .conftest import ROWS, SERVICE_TOKEN, spec_of, upload_messages
from .reporting import numbered, progressed, started, task_state, trained

EVENTS = 400
KILLS = 3


class Process:
    """An admission process that can be killed and started again on the same state."""

    def __init__(self, folder, models_root):
        self.folder = folder
        self.port = free_ports()
        self.internal_port = self.port + 1
        values = {
            "SERVICE_TOKEN": SERVICE_TOKEN,
            "LISTEN": f"127.0.0.1:{self.port}",
            "INTERNAL_LISTEN": f"127.0.0.1:{self.internal_port}",
            "DATABASE_URL": f"sqlite+aiosqlite:///{folder / 'admission.db'}",
            "ARTIFACT_ROOT": str(folder / "artifacts"),
            "UPLOAD_FOLDER": str(folder / "uploads"),
            "MODELS_ROOT": str(models_root),
            "PLACEMENT_ADDRESS": "127.0.0.1:1",
            "LOCAL_KEY_FILE": str(folder / "local.key"),
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ALTO_ADMISSION_")}
        self.environment = {
            **inherited,
            **{f"ALTO_ADMISSION_{name}": value for name, value in values.items()},
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self.process = None

    async def start(self):
        with (self.folder / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "alto_admission", env=self.environment, stdout=log, stderr=log
            )
        await self.serving()

    async def serving(self):
        async with asyncio.timeout(60), grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                assert self.process.returncode is None, (self.folder / "log").read_text()
                try:
                    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=1)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                except grpc.aio.AioRpcError:
                    pass
                await asyncio.sleep(0.05)

    async def stop(self, number=signal.SIGKILL):
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
        return await self.process.wait()


@pytest.fixture
async def process(tmp_path, models_root):
    running = Process(tmp_path, models_root)
    await running.start()
    yield running
    await running.stop()


async def wait_for_another_try(error):
    """Wait a moment after a lost connection; anything else is a finding."""
    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise error
    await asyncio.sleep(0.05)


def events_of(task_id):
    events = [started()]
    for number in range(1, EVENTS):
        step = (number + 1) // 2
        events.append(trained("trial-001", step) if number % 2 else progressed(number / EVENTS))
    return numbered(task_id, 1, [*events, task_state(tuning_pb2.TASK_STATE_CANCELLED)])


async def report_all(process, task_id):
    """Report as a node does: in batches, from behind what was acknowledged, until all of it is."""
    requests = events_of(task_id)
    acknowledged = 0
    while acknowledged < len(requests):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{process.internal_port}") as channel:
            stub = report_service_pb2_grpc.ReportServiceStub(channel)
            try:
                batch = requests[acknowledged : acknowledged + 10]
                metadata = bearer_metadata(SERVICE_TOKEN)
                response = await stub.ReportEvents(iter(batch), metadata=metadata, timeout=5)
                acknowledged = response.acknowledged_sequence
            except grpc.aio.AioRpcError as error:
                await wait_for_another_try(error)
    return acknowledged


async def watch_all(process, task_id, metadata, received):
    """Watch as a client does: after each break from the last token, until the stream ends by itself."""
    token = ""
    while True:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{process.port}") as channel:
            stub = admission_service_pb2_grpc.AdmissionServiceStub(channel)
            request = messages.WatchTuningTaskRequest(task_id=task_id, resume_token=token)
            try:
                async for message in stub.WatchTuningTask(request, metadata=metadata, timeout=30):
                    token = message.resume_token
                    received.append(message)
                return
            except grpc.aio.AioRpcError as error:
                await wait_for_another_try(error)


async def create(process, metadata):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{process.port}") as channel:
        stub = admission_service_pb2_grpc.AdmissionServiceStub(channel)
        sha256 = hashlib.sha256(ROWS).hexdigest()
        header = {"request_id": "u", "file_name": "f.jsonl", "size_bytes": len(ROWS), "sha256": sha256}
        upload = await stub.UploadDataset(upload_messages(header, ROWS), metadata=metadata, timeout=30)
        request = messages.CreateTuningTaskRequest(request_id=uuid.uuid4().hex, spec=spec_of(upload.dataset.dataset_id))
        return (await stub.CreateTuningTask(request, metadata=metadata, timeout=30)).task


async def test_killed_in_the_middle(process, tmp_path):
    key_file = tmp_path / "local.key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    metadata = bearer_metadata(key_file.read_text().strip())
    task = await create(process, metadata)
    received = []
    watching = asyncio.ensure_future(watch_all(process, task.task_id, metadata, received))
    reporting = asyncio.ensure_future(report_all(process, task.task_id))
    for kill in range(KILLS):
        while len(received) < EVENTS * (kill + 1) // (KILLS + 2):
            await asyncio.sleep(0.01)
        await process.stop()
        await process.start()
    async with asyncio.timeout(60):
        await asyncio.gather(watching, reporting)
    snapshots = [message for message in received if message.HasField("snapshot")]
    assert len(snapshots) == 1, "one watch begins once"
    sequences = [message.event.sequence for message in received if message.HasField("event")]
    first = snapshots[0].snapshot.task.last_event_sequence + 1
    assert sequences == list(range(first, first + len(sequences)))
    steps = [m.event.trial_measured.metric.step for m in received if m.event.HasField("trial_measured")]
    missed = snapshots[0].snapshot.trials[0].step
    assert steps == list(range(missed + 1, EVENTS // 2 + 1)), "each step once, in order"
    assert received[-1].event.task_state_changed.state == tuning_pb2.TASK_STATE_CANCELLED
    assert await process.stop(signal.SIGTERM) == 0


async def test_a_second_start_keeps_the_local_key(process, tmp_path):
    key = (tmp_path / "local.key").read_text()
    assert await process.stop(signal.SIGTERM) == 0
    for file in tmp_path.glob("admission.db*"):
        file.unlink()
    await process.start()
    assert (tmp_path / "local.key").read_text() == key
    async with grpc.aio.insecure_channel(f"127.0.0.1:{process.port}") as channel:
        stub = admission_service_pb2_grpc.AdmissionServiceStub(channel)
        listed = await stub.ListDatasets(messages.ListDatasetsRequest(), metadata=bearer_metadata(key.strip()))
    assert not listed.datasets, "a new database knows the key, and nothing else"
