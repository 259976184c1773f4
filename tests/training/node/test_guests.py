"""Two tasks of one base model and one place: the second is trained in the executor of the first, by real processes."""

import os
import signal
import sqlite3

import torch
from alto.v1 import error_pb2, placement_pb2, placement_service_pb2, tuning_pb2
from alto_common.errors import reason_name
from processes import children, standing_still
from safetensors.torch import load_file

ASSIGNED = placement_pb2.PLACEMENT_STATE_ASSIGNED
RUNNING, QUEUED = tuning_pb2.TASK_STATE_RUNNING, tuning_pb2.TASK_STATE_QUEUED
SUCCEEDED, FAILED = tuning_pb2.TASK_STATE_SUCCEEDED, tuning_pb2.TASK_STATE_FAILED
CANCELLED = tuning_pb2.TASK_STATE_CANCELLED
# Steps: a host's that nobody waits for, one's that lasts some seconds, and guests'.
ENDLESS, LONG, MIDDLE, SHORT = 100_000, 1000, 400, 150
# On paper steps are many: waiting for the end of what trains is no alternative.
ON_PAPER = 100


def size(steps, trials=2, adapter_memory_bytes=1_000_000):
    """What admission would say of such a search: about 40 tokens a step."""
    steps *= ON_PAPER
    return placement_service_pb2.WorkSize(
        train_tokens=40 * steps * trials,
        evaluation_tokens=4 * 5 * 20 * trials,
        steps=steps * trials,
        longest_steps=steps,
        total_lora_rank=4 * trials,
        base_parameters=100_000,
        trials=trials,
        expected_share=1.0,
        shape="none",
        adapter_memory_bytes=adapter_memory_bytes,
    )


async def enqueue(house, task_id, steps, tenant="acme", **changes):
    """Queue a task that is worth sharing."""
    await house.enqueue(house.work(task_id, steps=steps, **changes), tenant=tenant, size=size(steps))


async def trains(house, wait_until, task_id, ticks=1):
    """Wait until a task is trained and its checkpoint is safe."""
    events = house.admission.events
    await wait_until(lambda: len(events("checkpoint_written", task_id)) >= ticks, what=f"a checkpoint of {task_id}")


async def begin(house, wait_until, steps=LONG, guest_steps=SHORT, tenant="acme", **settings):
    """Have a host and its guest trained in one worker."""
    if "node-a" not in house.nodes:
        await house.start_node(gpus=1, **settings)
    await enqueue(house, "host", steps)
    await trains(house, wait_until, "host")
    await enqueue(house, "guest", guest_steps, tenant)
    await wait_until(lambda: house.admission.events("execution_started", "guest"), what="the guest's start")
    with standing_still(house.worker_process()):
        planned = await house.planned("guest")
        assert planned.forecast.is_guest
        assert planned.forecast.host_task_id == "host"
        assert list(planned.gpu_indices) == []
        assert list((await house.planned("host")).forecast.guest_task_ids) == ["guest"]
        assert len(children(house.nodes["node-a"].process.pid)) == 1, "one worker for both"


def weights(house, task_id):
    """The latest adapter of each trial of a task, by step."""
    found = {}
    for event in house.admission.events("adapter_ready", task_id):
        path = house.artifact_root / event.adapter_ready.uri / "adapter_model.safetensors"
        found[event.trial_id] = (event.adapter_ready.adapter.step, load_file(path))
    return found


def check_as_alone(house, task_id, alone_id):
    """A task came to what the same task came to alone."""
    assert house.admission.states(task_id)[-1] == SUCCEEDED
    assert house.admission.states(task_id).count(SUCCEEDED) == 1
    shared, alone = weights(house, task_id), weights(house, alone_id)
    assert shared.keys() == alone.keys()
    for trial_id, (step, expected) in alone.items():
        assert shared[trial_id][0] == step
        for name, value in expected.items():
            distance = torch.linalg.vector_norm(shared[trial_id][1][name] - value) / torch.linalg.vector_norm(value)
            assert distance <= 1e-5, (trial_id, name, float(distance))


async def train_alone(house, wait_until, steps=SHORT):
    """Train what the guest is to come to, on the same node with nothing beside it."""
    await house.start_node(gpus=1)
    await enqueue(house, "alone", steps)
    await wait_until(lambda: house.ended("alone"), what="the end of the task alone")


def kept(house, task_id, *columns):
    """What placement's database says of a task."""
    with sqlite3.connect(house.folder / "placement.db") as database:
        query = f"select {', '.join(columns)} from tasks where task_id = ?"
        return database.execute(query, [task_id]).fetchone()


async def dequeue(house, metadata, task_id):
    request = placement_service_pb2.DequeueTaskRequest(task_id=task_id)
    await house.stub.DequeueTask(request, metadata=metadata, timeout=10)


async def test_a_guest_starts_and_ends_while_its_host_is_trained(house, wait_until):
    await train_alone(house, wait_until)
    await begin(house, wait_until)
    await wait_until(lambda: house.ended("guest"), what="the guest's end")
    check_as_alone(house, "guest", "alone")
    assert house.admission.states("host") == [RUNNING], "the host is still trained"
    await wait_until(lambda: house.ended("host"), what="the host's end")
    assert house.admission.states("host")[-1] == SUCCEEDED
    assert (house.admission.attempts("host"), house.admission.attempts("guest")) == (1, 1)
    assert kept(house, "guest", "failures", "alone") == (0, 0)
    # What a guest leaves behind is no more than what any task leaves.
    assert not list((house.folder / "node-a" / "tasks" / "guest").glob("executor*"))


async def test_a_worker_that_is_killed_costs_both_an_attempt_and_neither_a_failure(house, wait_until):
    await train_alone(house, wait_until, steps=MIDDLE)
    await begin(house, wait_until, LONG, MIDDLE)
    await trains(house, wait_until, "guest")
    os.kill(house.worker_process(), signal.SIGKILL)
    await wait_until(lambda: len(house.admission.events("execution_started", "host")) == 2, what="the host's return")
    await wait_until(lambda: kept(house, "guest", "alone") == (1,), what="that the guest shares no more")
    assert not (await house.planned("guest")).forecast.is_guest
    for task_id in ("host", "guest"):
        await wait_until(lambda task_id=task_id: house.ended(task_id), what=f"the end of {task_id}")
        started = house.admission.events("execution_started", task_id)
        assert [one.execution_started.resumed for one in started] == [False, True]
        assert kept(house, task_id, "attempts", "failures", "alone") == (2, 0, 1)
    check_as_alone(house, "guest", "alone")


async def test_a_guest_that_is_cancelled_costs_its_host_nothing(house, wait_until, metadata):
    await begin(house, wait_until, LONG, LONG)
    await trains(house, wait_until, "guest")
    worker = house.worker_process()
    await dequeue(house, metadata, "guest")
    await wait_until(lambda: house.ended("guest"), what="the guest's end")
    assert house.admission.states("guest") == [RUNNING, CANCELLED]
    assert house.worker_process() == worker
    await wait_until(lambda: house.ended("host"), what="the host's end")
    assert house.admission.states("host") == [RUNNING, SUCCEEDED]


async def test_a_guest_goes_on_from_its_checkpoint_when_its_host_has_ended(house, wait_until, metadata):
    await train_alone(house, wait_until, steps=MIDDLE)
    await begin(house, wait_until, ENDLESS, MIDDLE)
    await trains(house, wait_until, "guest")
    await dequeue(house, metadata, "host")
    await wait_until(lambda: house.ended("host"), what="the host's end")
    assert house.admission.states("host") == [RUNNING, CANCELLED]
    await wait_until(lambda: house.ended("guest"), what="the guest's end")
    started = [event.execution_started for event in house.admission.events("execution_started", "guest")]
    assert [one.resumed for one in started] == [False, True]
    assert house.admission.states("guest") == [RUNNING, QUEUED, RUNNING, SUCCEEDED]
    assert kept(house, "guest", "attempts", "failures", "alone") == (2, 0, 0)
    check_as_alone(house, "guest", "alone")


async def test_a_guest_that_is_paused_goes_on_in_the_same_executor(house, wait_until, metadata):
    await begin(house, wait_until, ENDLESS, ENDLESS)
    await trains(house, wait_until, "guest")
    worker = house.worker_process()
    for held, state in ((True, tuning_pb2.TASK_STATE_PAUSED), (False, RUNNING)):
        request = placement_service_pb2.UpdateTaskRequest(task_id="guest", held=held)
        await house.stub.UpdateTask(request, metadata=metadata, timeout=10)
        await wait_until(lambda state=state: house.admission.states("guest")[-1] == state, what=f"state {state}")
    assert (await house.planned("guest")).forecast.is_guest
    assert house.worker_process() == worker
    started = [event.execution_started for event in house.admission.events("execution_started", "guest")]
    assert [one.resumed for one in started] == [False, True]


async def test_a_worker_that_does_not_let_go_of_a_guest_is_ended(house, wait_until, metadata):
    await begin(house, wait_until, LONG, LONG, stop_grace_s=1)
    await trains(house, wait_until, "guest")
    worker = house.worker_process()
    os.kill(worker, signal.SIGSTOP)
    await dequeue(house, metadata, "guest")
    await wait_until(lambda: house.ended("guest"), what="the guest's end")
    assert house.admission.states("guest") == [RUNNING, CANCELLED]
    await wait_until(lambda: house.ended("host"), what="the host's end")
    assert house.admission.states("host") == [RUNNING, RUNNING, SUCCEEDED]
    assert kept(house, "host", "attempts", "failures", "alone") == (2, 0, 1)


async def test_a_guest_that_cannot_be_trained_costs_its_host_nothing(house, wait_until):
    await house.start_node(gpus=1)
    await enqueue(house, "host", LONG)
    await trains(house, wait_until, "host")
    work = house.work("guest", steps=SHORT)
    work.train.sha256 = "0" * 64
    await house.enqueue(work, size=size(SHORT))
    await wait_until(lambda: house.ended("guest"), what="the guest's end")
    (failed,) = house.admission.events("task_state_changed", "guest")
    assert failed.task_state_changed.state == FAILED
    assert failed.task_state_changed.failure.reason == reason_name(error_pb2.ERROR_REASON_CONTENT_MISMATCH)
    await wait_until(lambda: house.ended("host"), what="the host's end")
    assert house.admission.states("host") == [RUNNING, SUCCEEDED]
    assert house.admission.attempts("host") == 1


async def test_tasks_of_different_tenants_share_nothing(house, wait_until):
    await house.start_node(gpus=1)
    await enqueue(house, "host", ENDLESS)
    await trains(house, wait_until, "host")
    await enqueue(house, "guest", SHORT, tenant="other")
    await enqueue(house, "own", SHORT)
    await wait_until(lambda: house.ended("own"), what="the end of the tenant's own guest")
    planned = await house.planned("guest")
    assert planned.state == placement_pb2.PLACEMENT_STATE_WAITING
    assert not planned.forecast.is_guest
