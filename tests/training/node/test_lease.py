"""A node that hears nothing from placement stops by itself: at a checkpoint when there is time, and else at once."""

import os
import signal

import pytest
from alto.v1 import placement_service_pb2, tuning_pb2
from alto_training.assignments import Assignments
from processes import standing_still


async def begin(house, wait_until, lease_s, **settings):
    await house.restart_placement(lease_s=str(lease_s))
    await house.start_node(**settings)
    await house.enqueue(house.work(steps=100_000))
    await wait_until(lambda: house.admission.events("checkpoint_written"), what="a checkpoint")


async def goes_on(house, wait_until, metadata):
    """Wait until the task is trained again, from where it was, and cancel it."""
    admission = house.admission
    await wait_until(lambda: len(admission.events("execution_started")) == 2, what="another start")
    assert admission.events("execution_started")[-1].execution_started.resumed
    assert admission.attempts() == 2
    assert not house.logged("node-a", "the worker crashed")
    assert house.logged("node-a", "assignment ended")[0]["outcome"] == "stopped"
    request = placement_service_pb2.DequeueTaskRequest(task_id="task")
    await house.stub.DequeueTask(request, metadata=metadata, timeout=20)
    await wait_until(house.ended)
    assert admission.states()[-1] == tuning_pb2.TASK_STATE_CANCELLED


async def test_workers_write_a_checkpoint_before_the_lease_runs_out(house, wait_until, metadata):
    await begin(house, wait_until, lease_s=30)
    with standing_still(house.placement.process.pid):
        await wait_until(lambda: house.worker_process() is None, what="the worker's end")
        await wait_until(lambda: house.admission.states()[-1] == tuning_pb2.TASK_STATE_QUEUED, what="its last word")
    assert len(house.logged("node-a", "placement is silent: a checkpoint before the lease runs out")) == 1
    (ended,) = house.logged("node-a", "worker ended as asked")
    assert ended["reason"] == "lease_ends"
    assert not house.logged("node-a", "worker ended by its node")
    await goes_on(house, wait_until, metadata)


# With the second a worker has less time than there is.
@pytest.mark.parametrize("settings", [{"lease_s": 4}, {"lease_s": 8, "stop_grace_s": 0.2}])
async def test_a_worker_that_does_not_stop_is_ended_with_the_lease(house, wait_until, metadata, settings):
    await begin(house, wait_until, **settings)
    os.kill(house.worker_process(), signal.SIGSTOP)
    with standing_still(house.placement.process.pid):
        await wait_until(lambda: house.worker_process() is None, what="the worker's end without a lease")
    (ended,) = house.logged("node-a", "worker ended by its node")
    assert ended["reason"] in ("lease_lost", "lease_ends, and it did not stop in time")
    await goes_on(house, wait_until, metadata)


@pytest.mark.parametrize(("now_s", "near", "lost"), [(19.9, 0, 0), (20.0, 1, 0), (29.9, 1, 0), (30.0, 0, 1)])
def test_the_last_third_of_a_lease_is_for_checkpoints(now_s, near, lost):
    assignments = Assignments()
    assignments.next_turn(0.0, first=True)
    assert assignments.near_lease_end(now_s) == []
    assignments.renewed(30.0)
    assignments.offer("a", "task", 1, (0,), 1.0)
    assert len(assignments.near_lease_end(now_s)) == near
    assert len(assignments.without_lease(now_s)) == lost
    assignments.next_turn(10.0, first=False)
    assignments.renewed(30.0)
    assert assignments.near_lease_end(29.9) == []
