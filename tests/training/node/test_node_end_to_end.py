"""The main path with real processes: enqueue, assign, train, report, end."""

from alto.v1 import tuning_pb2


async def test_a_task_is_trained_and_every_event_arrives(house, wait_until):
    await house.start_node()
    await house.enqueue(house.work())
    await wait_until(house.ended, what="the end of the task")
    admission = house.admission
    assert admission.states() == [tuning_pb2.TASK_STATE_RUNNING, tuning_pb2.TASK_STATE_SUCCEEDED]
    started = admission.events("execution_started")[0].execution_started
    assert (started.node_id, started.device, started.kernel_backend) == ("node-a", "cpu", "reference")
    curves = admission.measurements()
    for trial in ("trial-0", "trial-1"):
        assert sorted(curves[trial, "train"]) == list(range(1, 13))
        assert sorted(curves[trial, "validation"]) == [3, 6, 9, 12]
    for event in admission.events("adapter_ready"):
        for file in event.adapter_ready.adapter.files:
            stored = house.artifact_root / event.adapter_ready.uri / file.name
            assert stored.stat().st_size == file.size_bytes
    assert admission.reports[-1].event.task_state_changed.state == tuning_pb2.TASK_STATE_SUCCEEDED
