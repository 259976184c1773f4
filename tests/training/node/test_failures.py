"""Whatever is killed in the middle, the task ends once and with the same adapters as undisturbed."""

import os
import signal

import pytest
from alto.v1 import placement_pb2, placement_service_pb2, tuning_pb2

# A few seconds' work: whatever is killed is killed in the middle of it.
STEPS = 500


@pytest.fixture(scope="module")
def undisturbed():
    """What the task comes to without any trouble; the first test finds out."""
    return {}


async def begin(house, wait_until):
    """Start a task and wait until it is well under way, with a checkpoint on the disk."""
    await house.start_node()
    await house.enqueue(house.work(steps=STEPS))
    await wait_until(lambda: house.admission.events("checkpoint_written"), what="a checkpoint")


def result(house):
    """What a task came to, which no trouble may change."""
    validation = {key: curve for key, curve in house.admission.measurements().items() if key[1] == "validation"}
    return house.admission.adapters(), validation


def check(house, undisturbed):
    admission = house.admission
    assert admission.states()[-1] == tuning_pb2.TASK_STATE_SUCCEEDED
    assert admission.states().count(tuning_pb2.TASK_STATE_SUCCEEDED) == 1
    curves = admission.measurements()
    for trial in ("trial-0", "trial-1"):
        assert sorted(curves[trial, "train"]) == list(range(1, STEPS + 1))
    assert result(house) == undisturbed.setdefault("result", result(house))


async def test_nothing_happens(house, wait_until, undisturbed):
    await begin(house, wait_until)
    await wait_until(house.ended)
    check(house, undisturbed)


async def test_the_worker_is_killed(house, wait_until, undisturbed):
    await begin(house, wait_until)
    os.kill(house.worker_process(), signal.SIGKILL)
    await wait_until(house.ended)
    check(house, undisturbed)
    assert house.admission.attempts() == 2


async def test_the_node_is_killed(house, wait_until, undisturbed):
    await begin(house, wait_until)
    worker = house.worker_process()
    await house.nodes["node-a"].kill()
    await wait_until(lambda: not os.path.exists(f"/proc/{worker}"), what="the worker's end with its node")
    await house.nodes["node-a"].start()
    await wait_until(house.ended)
    check(house, undisturbed)
    assert house.admission.attempts() == 2


async def test_placement_is_killed(house, wait_until, undisturbed):
    await begin(house, wait_until)
    worker = house.worker_process()
    await house.restart_placement()
    plan = await house.plan()
    assert [task.state for task in plan.tasks] in ([placement_pb2.PLACEMENT_STATE_ASSIGNED], [])
    await wait_until(house.ended)
    check(house, undisturbed)
    assert house.admission.attempts() == 1
    assert house.worker_process() in (worker, None)


async def test_admission_is_away_for_a_while(house, wait_until, undisturbed):
    await house.start_node()
    house.admission.refuse = True
    await house.enqueue(house.work(steps=STEPS))
    journals = (house.folder / "node-a" / "tasks" / "task" / "assignments").glob
    await wait_until(lambda: any(j.stat().st_size > 4000 for j in journals("*/journal")), what="something to report")
    assert house.admission.reports == []
    assert not await house.ended()
    house.admission.refuse = False
    await wait_until(house.ended)
    check(house, undisturbed)


async def test_a_drained_node_hands_over_to_another(house, wait_until, metadata):
    await begin(house, wait_until)
    await house.start_node("node-b")
    await house.stub.DrainNode(placement_service_pb2.DrainNodeRequest(node_id="node-a"), metadata=metadata, timeout=20)
    await wait_until(house.ended)
    # node-b has no checkpoint of node-a's: it begins again and comes to the same.
    started = [event.execution_started.node_id for event in house.admission.events("execution_started")]
    assert started == ["node-a", "node-b"]
    assert tuning_pb2.TASK_STATE_QUEUED in house.admission.states()
    assert house.admission.states()[-1] == tuning_pb2.TASK_STATE_SUCCEEDED


@pytest.mark.parametrize("told", ["node", "all its processes"])
async def test_a_node_that_is_stopped_gives_its_task_back_with_a_checkpoint(house, wait_until, undisturbed, told):
    await house.restart_placement(lease_s="3600")  # nothing here comes of a lease that ends
    await begin(house, wait_until)
    if told != "node":
        os.kill(house.worker_process(), signal.SIGTERM)
    await house.nodes["node-a"].kill(signal.SIGTERM)
    assert house.nodes["node-a"].process.returncode == 0
    assert [line["reason"] for line in house.logged("node-a", "worker ended as asked")] == ["drained"]
    assert house.admission.states()[-1] == tuning_pb2.TASK_STATE_QUEUED
    plan = await house.plan()
    assert [node.state for node in plan.nodes] == [placement_pb2.NODE_STATE_LEFT]
    assert [task.state for task in plan.tasks] == [placement_pb2.PLACEMENT_STATE_WAITING]
    await house.nodes["node-a"].start()
    await wait_until(house.ended)
    check(house, undisturbed)
    assert house.admission.events("execution_started")[-1].execution_started.resumed
