"""What Prometheus reads of admission: calls with their codes, what is queued, what ended and why."""

import asyncio

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import tuning_pb2
from alto_common.monitoring import FRESH_S
from alto_common.rpc.channel import bearer_metadata
from metrics_page import metrics_of

from .conftest import Client
from .reporting import decided, numbered, started, task_state, trial_state

SUCCEEDED = tuning_pb2.TRIAL_STATE_SUCCEEDED
STOPPED = tuning_pb2.TRIAL_STATE_STOPPED


@pytest.fixture
async def admission(started):
    return await started(metrics_listen="127.0.0.1:0")


async def test_calls_are_counted_with_the_code_that_they_end_with(admission):
    client = await admission.client()
    await client.create()
    stranger = Client(admission.public, bearer_metadata("no such key"))
    request = messages.GetTuningTaskRequest(task_id="task-of-nobody")
    for one in (client, client, stranger):
        with pytest.raises(grpc.aio.AioRpcError):
            await one.call("GetTuningTask", request)
    value = await metrics_of(admission.server.metrics_port)
    assert value("alto_calls_total", method="CreateTuningTask", code="OK") == 1
    assert value("alto_calls_total", method="UploadDataset", code="OK") == 1
    assert value("alto_calls_total", method="GetTuningTask", code="NOT_FOUND") == 2
    assert value("alto_calls_total", method="GetTuningTask", code="UNAUTHENTICATED") == 1
    assert value("alto_call_seconds_count", method="GetTuningTask") == 3


async def test_a_stream_is_open_until_its_caller_leaves(admission):
    client = await admission.client()
    task = await client.create()
    watch = client.stream("WatchTuningTask", messages.WatchTuningTaskRequest(task_id=task.task_id))
    await anext(aiter(watch))
    value = await metrics_of(admission.server.metrics_port)
    assert value("alto_open_streams", method="WatchTuningTask") == 1
    watch.cancel()
    while value("alto_open_streams", method="WatchTuningTask"):
        await asyncio.sleep(0.02)
        value = await metrics_of(admission.server.metrics_port)
    assert value("alto_calls_total", method="WatchTuningTask", code="CANCELLED") == 1
    assert value("alto_call_seconds_count", method="WatchTuningTask") is None

    request = messages.WatchTuningTaskRequest(task_id=task.task_id)
    late = client.stub.WatchTuningTask(request, metadata=client.metadata, timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in late:
            pass
    while not value("alto_calls_total", method="WatchTuningTask", code="DEADLINE_EXCEEDED"):
        await asyncio.sleep(0.02)
        value = await metrics_of(admission.server.metrics_port)


async def test_what_is_queued_and_what_ended_and_why(admission, placement):
    client = await admission.client()
    first, second, third = [await client.create() for _ in range(3)]
    while len(placement.enqueued) < 3:
        await asyncio.sleep(0.02)
    events = [
        started(),
        trial_state("trial-001", tuning_pb2.TRIAL_STATE_RUNNING),
        decided("trial-001", 2),
        trial_state("trial-001", STOPPED, 2),
        decided("trial-002", 2, tuning_pb2.VERDICT_KEEP),
    ]
    requests = numbered(first.task_id, 1, events)
    await admission.report(requests)
    await admission.report(requests)  # a node that has not heard the answer says it again
    await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=second.task_id))
    value = await metrics_of(admission.server.metrics_port)
    assert (value("alto_tasks", state="queued"), value("alto_tasks", state="running")) == (1, 1)
    assert 0 < value("alto_oldest_queued_seconds") < 600
    assert value("alto_stop_decisions_total", policy="paper", rule="underperformance") == 1
    assert value("alto_trials_ended_total", state="stopped") == 1
    assert value("alto_trials_ended_total", state="cancelled") == 2
    assert value("alto_tasks_ended_total", state="cancelled") == 1
    assert third.state == tuning_pb2.TASK_STATE_QUEUED

    failed = task_state(tuning_pb2.TASK_STATE_FAILED, tuning_pb2.Failure(reason="EXECUTION_FAILED", message="broken"))
    await admission.report(numbered(first.task_id, 1, [failed], first=len(events) + 1))
    await asyncio.sleep(FRESH_S)
    value = await metrics_of(admission.server.metrics_port)
    assert value("alto_tasks_ended_total", state="failed") == 1
    assert value("alto_tasks", state="running") is None
    while value("alto_outbox_deliveries"):
        await asyncio.sleep(0.02)
        value = await metrics_of(admission.server.metrics_port)
