"""Watching over real sockets: nothing lost, nothing repeated, nobody's memory filled."""

import asyncio
from contextlib import suppress

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import tuning_pb2
from alto_common.rpc.status import reason_in
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from .reporting import numbered, progressed, task_state, trained
from .reporting import started as execution_started

CANCELLED = tuning_pb2.TASK_STATE_CANCELLED


def details_of(error, kind):
    found = kind()
    assert any(detail.Unpack(found) for detail in rpc_status.from_call(error).details)
    return found


async def read(stream, count):
    return [await asyncio.wait_for(stream.read(), 10) for _ in range(count)]


def watch(client, task, token=""):
    request = messages.WatchTuningTaskRequest(task_id=task.task_id, resume_token=token)
    return client.stream("WatchTuningTask", request)


async def test_a_resumed_watch_carries_on_behind_its_token(admission):
    client = await admission.client()
    task = await client.create()
    await admission.report(
        numbered(task.task_id, 1, [execution_started(), *(trained("trial-001", step) for step in range(1, 9))])
    )
    first = watch(client, task)
    (snapshot,) = await read(first, 1)
    assert [trial.step for trial in snapshot.snapshot.trials] == [8, 0]
    first.cancel()
    await admission.report(numbered(task.task_id, 1, [progressed(0.5), progressed(0.6)], first=10))
    second = watch(client, task, snapshot.resume_token)
    one, two = await read(second, 2)
    assert [one.event.sequence, two.event.sequence] == [
        snapshot.snapshot.task.last_event_sequence + 1,
        snapshot.snapshot.task.last_event_sequence + 2,
    ]
    second.cancel()
    third = watch(client, task, one.resume_token)
    assert (await read(third, 1)) == [two]
    third.cancel()


async def test_a_watch_of_an_ended_task_ends(admission):
    client = await admission.client()
    task = await client.create()
    await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=task.task_id))
    (only,) = [message async for message in watch(client, task)]
    assert only.snapshot.task.state == CANCELLED
    assert [message async for message in watch(client, task, only.resume_token)] == []


async def test_a_tenant_has_so_many_watches_at_a_time(started):
    admission = await started(max_watches=2)
    client, other = await admission.client(), await admission.client("umbrella")
    task = await client.create()
    streams = [watch(client, task) for _ in range(2)]
    for stream in streams:
        await read(stream, 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(watch(client, task), 1)
    assert (caught.value.code(), reason_in(caught.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    await read(watch(other, await other.create()), 1)
    streams[0].cancel()
    async with asyncio.timeout(10):
        while True:
            with suppress(grpc.aio.AioRpcError):
                await read(watch(client, task), 1)
                break


async def test_heartbeats_carry_the_token(started):
    admission = await started(heartbeat_s=0.1)
    client = await admission.client()
    task = await client.create()
    await asyncio.sleep(0.3)  # The hand-over to placement makes events of its own.
    stream = watch(client, task)
    snapshot, *rest = await read(stream, 4)
    beats = [message for message in rest if message.HasField("heartbeat")]
    assert beats
    assert beats[-1].resume_token >= snapshot.resume_token
    stream.cancel()


async def test_a_slow_client_gets_a_marker_and_a_snapshot(started):
    admission = await started(max_watch_lag=50)
    client = await admission.client()
    task = await client.create()
    slow = watch(client, task)
    await read(slow, 1)
    first = 1
    for _ in range(6):
        events = [progressed((first + number) / 10_000) for number in range(500)]
        await admission.report(numbered(task.task_id, 1, events, first))
        first += 500
    last = (await client.call("GetTuningTask", messages.GetTuningTaskRequest(task_id=task.task_id))).task
    sequence = 0
    left_out = 0
    while sequence < last.last_event_sequence:
        (message,) = await read(slow, 1)
        match message.WhichOneof("message"):
            case "event":
                assert not sequence or message.event.sequence == sequence + 1
                sequence = message.event.sequence
            case "compacted":
                left_out += message.compacted.events_left_out
                (message,) = await read(slow, 1)
                assert message.HasField("snapshot")
                sequence = message.snapshot.task.last_event_sequence
    assert left_out > 0
    slow.cancel()


async def test_a_token_that_is_too_old_says_where_to_begin(started):
    admission = await started(events_kept=10)
    client = await admission.client()
    task = await client.create()
    stream = watch(client, task)
    (snapshot,) = await read(stream, 1)
    stream.cancel()
    for number in range(3):
        events = [progressed((number * 20 + at) / 100) for at in range(20)]
        await admission.report(numbered(task.task_id, 1, events, number * 20 + 1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(watch(client, task, snapshot.resume_token), 1)
    assert (caught.value.code(), reason_in(caught.value)) == (grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_TOO_OLD")
    earliest = details_of(caught.value, error_details_pb2.ErrorInfo).metadata["earliest_resume_token"]
    again = watch(client, task, earliest)
    assert (await read(again, 1))[0].HasField("event")
    again.cancel()


async def test_another_process_wrote(started):
    """Two servers on one database: the second has only polling to learn from."""
    one, two = await started(), await started()
    client = await one.client()
    task = await client.create()
    stream = watch(client, task)
    await read(stream, 1)
    await two.report(numbered(task.task_id, 1, [task_state(CANCELLED)]))
    message = None
    # Well before a heartbeat would have looked.
    async with asyncio.timeout(10):
        while (received := await stream.read()) is not grpc.aio.EOF:
            message = received
    assert message.event.task_state_changed.state == CANCELLED


async def test_a_drained_server_ends_its_watches_with_the_last_token(started):
    admission = await started()
    client = await admission.client()
    task = await client.create()
    stream = watch(client, task)
    (message,) = await read(stream, 1)
    stopping = asyncio.ensure_future(admission.server.stop())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            (message,) = await read(stream, 1)
    assert reason_in(caught.value) == "UNAVAILABLE"
    assert details_of(caught.value, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1000
    assert details_of(caught.value, error_details_pb2.ErrorInfo).metadata["resume_token"] == message.resume_token
    await stopping
