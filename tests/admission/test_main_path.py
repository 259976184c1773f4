"""The main path over real sockets, on both databases: upload, create, enqueue, reports, watch, download."""

import asyncio

from alto.v1 import admission_service_pb2 as messages
from alto.v1 import tuning_pb2

from .reporting import Node


async def test_from_upload_to_download(database_url, started, placement, tmp_path):
    admission = await started(database_url=database_url)
    client = await admission.client()
    task = await client.create()
    assert (task.state, task.trial_count) == (tuning_pb2.TASK_STATE_QUEUED, 2)
    while not placement.enqueued:
        await asyncio.sleep(0.02)
    work = placement.enqueued[task.task_id].work
    assert [trial.trial_id for trial in work.trials] == ["trial-001", "trial-002"]

    watch = client.stream("WatchTuningTask", messages.WatchTuningTaskRequest(task_id=task.task_id))
    node = Node(admission, work, tmp_path / "artifacts")
    messages_of_watch = aiter(watch)
    snapshot = await anext(messages_of_watch)
    assert snapshot.WhichOneof("message") == "snapshot"
    training = asyncio.ensure_future(node.train_all())
    events = [message.event async for message in messages_of_watch if message.HasField("event")]
    await training

    first = snapshot.snapshot.task.last_event_sequence + 1
    assert [event.sequence for event in events] == list(range(first, first + len(events)))
    assert events[-1].task_state_changed.state == tuning_pb2.TASK_STATE_SUCCEEDED

    task = (await client.call("GetTuningTask", messages.GetTuningTaskRequest(task_id=task.task_id))).task
    assert task.state == tuning_pb2.TASK_STATE_SUCCEEDED
    assert task.best_trial_id == "trial-002"
    request = messages.DownloadAdapterRequest(task_id=task.task_id)
    header, *chunks = [message async for message in client.stream("DownloadAdapter", request)]
    assert header.header.trial_id == "trial-002"
    assert b"".join(chunk.chunk.data for chunk in chunks) == b"weights of trial-002{}"
