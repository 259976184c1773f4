"""A task leaves its place only for a reason, at a checkpoint, and carries on from there; real processes throughout."""

import json

from alto.v1 import placement_pb2, placement_service_pb2, tuning_pb2

# So much work, on paper, that waiting for its end is no alternative.
LONG = placement_service_pb2.WorkSize(train_tokens=50_000_000, steps=400, longest_steps=200, trials=2)
# Some seconds' work: it is not over before anybody can ask for its place.
LASTING_STEPS = 600
ASSIGNED = placement_pb2.PLACEMENT_STATE_ASSIGNED
WAITING = placement_pb2.PLACEMENT_STATE_WAITING


async def enqueue(house, metadata, task_id, steps, **fields):
    request = placement_service_pb2.EnqueueTaskRequest(
        work=house.work(task_id, steps=steps), **{"tenant": "acme", "size": LONG, **fields}
    )
    await house.stub.EnqueueTask(request, metadata=metadata, timeout=20, wait_for_ready=True)


def resumed(house, task_id):
    return [event.execution_started.resumed for event in house.admission.events("execution_started", task_id)]


async def test_a_task_of_higher_priority_takes_the_place_and_gives_it_back(house, wait_until, metadata):
    await house.start_node()
    await enqueue(house, metadata, "patient", LASTING_STEPS)
    await wait_until(lambda: house.admission.events("checkpoint_written", "patient"), what="a checkpoint")
    # Of the same priority: nobody is moved for it.
    await enqueue(house, metadata, "equal", 4)
    await wait_until(lambda: is_in(house, "equal", WAITING), what="the equal one in the plan")
    assert (await house.planned("patient")).state == ASSIGNED
    await enqueue(house, metadata, "urgent", 4, priority=10)
    await wait_until(lambda: is_in(house, "urgent", ASSIGNED), what="the urgent one's start")
    assert (await house.planned("patient")).state == WAITING
    for task_id in ("urgent", "patient", "equal"):
        await wait_until(lambda task_id=task_id: house.ended(task_id), what=f"{task_id}'s end")
        assert house.admission.states(task_id)[-1] == tuning_pb2.TASK_STATE_SUCCEEDED
    assert tuning_pb2.TASK_STATE_QUEUED in house.admission.states("patient")
    assert resumed(house, "patient") == [False, True]
    assert resumed(house, "urgent") == resumed(house, "equal") == [False]


async def test_a_quota_that_was_lent_is_given_back(house, wait_until, metadata):
    lent = {"quota_gpus": 1, "cohort": "lab"}
    await house.restart_placement(tenants=json.dumps({"ada": lent, "bo": lent}))
    await house.start_node(gpus=2)
    await enqueue(house, metadata, "own", LASTING_STEPS, tenant="ada")
    await wait_until(lambda: is_in(house, "own", ASSIGNED), what="the first start")
    await enqueue(house, metadata, "borrowed", LASTING_STEPS, tenant="ada")
    await wait_until(lambda: house.admission.events("checkpoint_written", "borrowed"), what="a checkpoint")
    await enqueue(house, metadata, "claim", 4, tenant="bo")
    await wait_until(lambda: is_in(house, "claim", ASSIGNED), what="the claim's start")
    for task_id in ("claim", "own", "borrowed"):
        await wait_until(lambda task_id=task_id: house.ended(task_id), what=f"{task_id}'s end")
        assert house.admission.states(task_id)[-1] == tuning_pb2.TASK_STATE_SUCCEEDED
    # One of the two gave way, at a checkpoint.
    assert sorted((resumed(house, "own"), resumed(house, "borrowed"))) == [[False], [False, True]]


async def is_in(house, task_id, state):
    planned = await house.planned(task_id)
    return planned is not None and planned.state == state
