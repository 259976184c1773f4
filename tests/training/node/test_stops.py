"""Stops on request, and tasks that cannot be trained: real processes again."""

import asyncio

import grpc
import pytest
from alto.v1 import placement_pb2, placement_service_pb2, training_node_service_pb2, tuning_pb2
from alto_common.rpc.authentication import Scope
from alto_common.rpc.status import reason_in
from alto_training.servicer import SCOPES
from alto_training.worker_task import without_host_paths

wire = placement_service_pb2


async def test_stop_a_trial_pause_resume_cancel(house, node_stub, metadata, wait_until):
    admission = house.admission

    def ends(trial_id):
        return [e.trial_state_changed.state for e in admission.events("trial_state_changed") if e.trial_id == trial_id]

    async def update(**fields):
        await house.stub.UpdateTask(wire.UpdateTaskRequest(task_id="task", **fields), metadata=metadata, timeout=20)

    await house.start_node()
    await house.enqueue(house.work(steps=100_000, trials=3))
    await wait_until(lambda: admission.events("task_progressed"), what="progress")

    async with node_stub() as stub:
        executors = (
            await stub.GetExecutorState(
                training_node_service_pb2.GetExecutorStateRequest(), metadata=metadata, timeout=20
            )
        ).executors
        assert [(e.task_id, e.process_id) for e in executors] == [("task", house.worker_process())]
        node = (await stub.GetNode(training_node_service_pb2.GetNodeRequest(), metadata=metadata, timeout=20)).node
        assert (node.gpu_kind, node.gpus, node.gpus_in_use) == ("cpu", 1, 1)
        request = training_node_service_pb2.WatchAssignmentRequest(assignment_id=executors[0].assignment_id)
        async for response in stub.WatchAssignment(request, metadata=metadata):
            assert response.event.task_state_changed.state == tuning_pb2.TASK_STATE_RUNNING
            break
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            unknown = training_node_service_pb2.WatchAssignmentRequest(assignment_id="unknown")
            await anext(aiter(stub.WatchAssignment(unknown, metadata=metadata)))
        assert reason_in(caught.value) == "RESOURCE_NOT_FOUND"

    await update(stop_trial_ids=["trial-0"])
    await wait_until(lambda: ends("trial-0")[-1:] == [tuning_pb2.TRIAL_STATE_CANCELLED], what="the trial's end")
    assert admission.states() == [tuning_pb2.TASK_STATE_RUNNING]

    await update(held=True)
    await wait_until(lambda: admission.states()[-1] == tuning_pb2.TASK_STATE_PAUSED, what="the pause")
    await wait_until(lambda: house.worker_process() is None)
    assert (await house.planned()).state in (placement_pb2.PLACEMENT_STATE_HELD, placement_pb2.PLACEMENT_STATE_STOPPING)

    await update(held=False)
    await wait_until(lambda: admission.states()[-1] == tuning_pb2.TASK_STATE_RUNNING, what="the resumption")
    # Told in an event of its own, behind that of the state.
    await wait_until(lambda: len(admission.events("execution_started")) == 2, what="the start after the pause")
    assert admission.events("execution_started")[-1].execution_started.resumed
    # The stopped trial stays where it was, the others go on.
    stopped_at = max(curve_steps(admission, "trial-0"))
    await wait_until(lambda: max(curve_steps(admission, "trial-1")) > stopped_at + 20, what="progress of the others")
    assert max(curve_steps(admission, "trial-0")) == stopped_at

    await house.stub.DequeueTask(wire.DequeueTaskRequest(task_id="task"), metadata=metadata, timeout=20)
    await wait_until(lambda: admission.states()[-1] == tuning_pb2.TASK_STATE_CANCELLED, what="the cancellation")
    assert ends("trial-1")[-1] == ends("trial-2")[-1] == tuning_pb2.TRIAL_STATE_CANCELLED
    # The stopped trial is no work any more; of the others hardly anything was done.
    assert 1 / 3 < admission.events("task_progressed")[-1].task_progressed.fraction_done < 0.5
    await wait_until(house.ended)


def curve_steps(admission, trial_id):
    return sorted(admission.measurements()[trial_id, "train"])


async def test_what_cannot_be_trained_says_why(house, wait_until, metadata):
    ended = {}

    async def watch():
        async for response in house.stub.WatchPlan(wire.WatchPlanRequest(), metadata=metadata, wait_for_ready=True):
            over = (placement_pb2.PLACEMENT_STATE_FINISHED, placement_pb2.PLACEMENT_STATE_GIVEN_UP)
            ended.update((task.task_id, task) for task in response.plan.tasks if task.state in over)

    watching = asyncio.create_task(watch())
    await house.start_node()
    await house.enqueue(house.work("no-such-model", base_model="unknown"))
    damaged = house.work("damaged")
    damaged.train.sha256 = "0" * 64
    await house.enqueue(damaged)
    missing = house.work("missing")
    missing.train.path, missing.train.sha256 = "datasets/nowhere.jsonl", "1" * 64
    await house.enqueue(missing)
    await wait_until(lambda: len(ended) == 3, what="the end of all three")
    watching.cancel()

    assert ended["damaged"].attempts == 1
    last = house.admission.events("task_state_changed", "damaged")[-1].task_state_changed
    assert (last.state, last.failure.reason) == (tuning_pb2.TASK_STATE_FAILED, "CONTENT_MISMATCH")
    # What another attempt may cure is tried again. Its tenant hears nothing of this host, its operator all.
    # Another node may have a model that this one lacks: admission has seen it.
    for task_id, why in (
        ("missing", "the worker process ended with status 1; its node's log says more"),
        ("no-such-model", "its node does not have the base model; that node's log says more"),
    ):
        assert (ended[task_id].state, ended[task_id].attempts) == (placement_pb2.PLACEMENT_STATE_GIVEN_UP, 3)
        assert ended[task_id].failure.message.endswith(why)
    assert "FileNotFoundError" in (house.folder / "node-a.log").read_text()
    assert len(house.logged("node-a", "the worker crashed")) == 6
    # The reason stands where the node says how an assignment ended.
    said = {line["task_id"]: line for line in house.logged("node-a", "assignment ended")}
    assert [said[task_id]["reason"] for task_id in ("no-such-model", "damaged", "missing")] == [
        "EXECUTION_FAILED",
        "CONTENT_MISMATCH",
        "EXECUTION_FAILED",
    ]
    assert ended["missing"].failure.message.endswith(said["missing"]["why"])


def test_a_tenant_reads_no_path_of_the_host():
    found = without_host_paths("/var/lib/alto/datasets/3f.jsonl has no rows (see '/tmp/x/log', https://a.b/c/d, 1/2)")
    assert found == "3f.jsonl has no rows (see 'log', https://a.b/c/d, 1/2)"


async def test_every_method_has_a_scope():
    service = training_node_service_pb2.DESCRIPTOR.services_by_name["TrainingNodeService"]
    assert set(SCOPES) == {f"/{service.full_name}/{method.name}" for method in service.methods}
    assert set(SCOPES.values()) == {Scope.SERVICE}


async def test_a_second_process_with_the_same_id_makes_the_first_one_stop(house, wait_until):
    first = await house.start_node(work_root=house.folder / "first")
    await wait_until(lambda: listed(house), what="the node")
    await house.start_node(work_root=house.folder / "second")
    assert await asyncio.wait_for(first.process.wait(), 60) == 3


async def listed(house):
    return (await house.plan()).nodes
