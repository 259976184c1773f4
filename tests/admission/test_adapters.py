"""Downloading adapters: whole, from any offset, the best one or a named one."""

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import tuning_pb2
from alto_common.rpc.status import reason_in

from .conftest import Running
from .reporting import Node, adapter_ready, evaluated, numbered, started, task_state, trial_state

CONTENT = b"weights of trial-001{}"


@pytest.fixture
async def trained(admission: Running, placement, tmp_path):
    """A client, and its task with one finished trial whose adapter can be downloaded."""
    client = await admission.client()
    task = await client.create()
    while not placement.enqueued:
        await admission.server.tasks.get(task.task_id)
    node = Node(admission, placement.enqueued[task.task_id].work, tmp_path / "artifacts")
    ready = node.written_adapter("trial-001", 0.5)
    better = evaluated("trial-002", 1, 0.1)
    await admission.report(numbered(task.task_id, 1, [started(), ready, better]))
    return client, task


async def download(client, task, trial_id="", offset=0):
    request = messages.DownloadAdapterRequest(task_id=task.task_id, trial_id=trial_id, offset=offset)
    header, *chunks = [message async for message in client.stream("DownloadAdapter", request)]
    at = offset
    for chunk in chunks:
        assert chunk.chunk.offset == at
        at += len(chunk.chunk.data)
    return header.header, b"".join(chunk.chunk.data for chunk in chunks)


async def reason(awaitable):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return reason_in(caught.value)


@pytest.mark.parametrize("offset", range(len(CONTENT) + 1))
async def test_from_any_offset_on(trained, offset):
    client, task = trained
    header, content = await download(client, task, "trial-001", offset)
    assert content == CONTENT[offset:]
    assert sum(file.size_bytes for file in header.adapter.files) == len(CONTENT)


async def test_the_best_is_the_best_that_can_be_had(trained):
    """trial-002 is better, but has no adapter yet."""
    client, task = trained
    header, content = await download(client, task)
    assert (header.trial_id, content) == ("trial-001", CONTENT)
    request = messages.GetTuningTaskRequest(task_id=task.task_id)
    assert (await client.call("GetTuningTask", request)).task.best_trial_id == "trial-002"


async def test_what_is_not_there(trained, tmp_path):
    client, task = trained
    assert await reason(download(client, task, "trial-002")) == "RESOURCE_NOT_FOUND"
    assert await reason(download(client, task, "trial-009")) == "RESOURCE_NOT_FOUND"
    assert await reason(download(client, task, "trial-001", 10_000)) == "INVALID_FIELD"
    for file in (tmp_path / "artifacts").rglob("adapter_model.safetensors"):
        file.unlink()
    assert await reason(download(client, task, "trial-001")) == "RESOURCE_NOT_FOUND"


async def test_adapters_stay_after_a_cancellation(trained, admission):
    client, task = trained
    end = [trial_state("trial-002", tuning_pb2.TRIAL_STATE_CANCELLED), task_state(tuning_pb2.TASK_STATE_CANCELLED)]
    await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=task.task_id))
    await admission.report(numbered(task.task_id, 1, end, first=4))
    request = messages.GetTuningTaskRequest(task_id=task.task_id)
    ended = (await client.call("GetTuningTask", request)).task
    assert (ended.state, ended.best_trial_id) == (tuning_pb2.TASK_STATE_CANCELLED, "trial-001")
    assert (await download(client, task))[1] == CONTENT


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("tenants/other/tasks/t", "a"),
        ("{own}/../../../other", "a"),
        ("{own}x", "a"),
        ("{own}", "../a"),
        ("{own}", ".."),
        ("{own}", ""),
    ],
)
async def test_a_node_cannot_hand_out_what_is_not_the_tasks(admission, folder, name):
    client = await admission.client()
    task = await client.create()
    folder = folder.format(own=f"tenants/acme/tasks/{task.task_id}")
    file = tuning_pb2.AdapterFile(name=name, size_bytes=1, sha256="0" * 64)
    events = numbered(task.task_id, 1, [started(), adapter_ready("trial-001", folder, 0.5, files=[file])])
    assert await reason(admission.report(events)) == "INVALID_FIELD"
