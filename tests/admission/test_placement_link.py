"""What placement hears of a task, and what a task hears of placement; over absences of either."""

import asyncio

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import placement_pb2, tuning_pb2
from alto_admission import dispatcher
from alto_admission.domain import placement_news
from alto_admission.store.outbox import Outbox
from alto_common.rpc.status import reason_in
from google.protobuf import timestamp_pb2

from .reporting import numbered, task_state
from .reporting import started as execution_started

AWAY = (grpc.StatusCode.UNAVAILABLE, "away")


async def until(condition, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
        return found


async def state_of(client, task):
    request = messages.GetTuningTaskRequest(task_id=task.task_id)
    return (await client.call("GetTuningTask", request)).task


def has_calls(placement, *calls):
    async def condition():
        return [call for call in placement.calls if call in calls] == list(calls)

    return condition


def has(found, wanted):
    async def condition():
        return wanted in found

    return condition


def has_some(found):
    async def condition():
        return found

    return condition


def becomes(client, task, **fields):
    async def condition():
        now = await state_of(client, task)
        return now if all(getattr(now, name) == value for name, value in fields.items()) else None

    return condition


def waits_for(client, task, reason):
    async def condition():
        now = await state_of(client, task)
        return now if now.queue.reason == reason else None

    return condition


async def handed_over(client, placement, dataset):
    """Two tasks whose plans are the test's own: placement has been given them."""
    tasks = [await client.create(dataset.dataset_id) for _ in range(2)]
    for task in tasks:
        await until(has_calls(placement, ("enqueue", task.task_id)))
        await until(waits_for(client, task, "PLANNING"))
    return tasks


async def test_what_is_handed_over_is_whole(admission, placement):
    client = await admission.client()
    validation = await client.upload()
    train = await client.upload()
    task = await client.create(
        train.dataset_id,
        validation_dataset_id=validation.dataset_id,
        priority=7,
        resources=tuning_pb2.Resources(gpus=2, gpu_kind="h100"),
        early_exit=tuning_pb2.EarlyExit(policy="none"),
    )
    await until(has_calls(placement, ("enqueue", task.task_id)))
    request = placement.enqueued[task.task_id]
    assert (request.tenant, request.priority, request.resources.gpus) == ("acme", 7, 2)
    work = request.work
    assert (work.base_model, work.train.sha256) == ("tiny-llama", train.sha256)
    assert work.train.path.endswith(f"{train.dataset_id}/rows.jsonl")
    assert work.validation.path.endswith(f"{validation.dataset_id}/rows.jsonl")
    assert work.artifact_folder == f"tenants/acme/tasks/{task.task_id}"
    assert [trial.config.lora_rank for trial in work.trials] == [2, 3]
    assert work.trials[0].config.HasField("adam_beta2"), "every field is set"
    assert work.evaluation.count == 20
    size = request.size
    # 20 rows of "q 7\na 7": 4 tokens and the end, over two trials of one epoch of batches of 8.
    assert (size.train_tokens, size.evaluation_tokens) == (200, 2 * 20 * 20 * 5)
    assert (size.steps, size.total_lora_rank, size.base_parameters, size.expected_share) == (6, 5, 100_000, 1.0)


async def test_requests_reach_placement_in_order(admission, placement):
    client = await admission.client()
    task = await client.create()
    for name in ("Pause", "Resume", "Cancel"):
        request = getattr(messages, f"{name}TuningTaskRequest")(task_id=task.task_id)
        await client.call(f"{name}TuningTask", request)
    wanted = [(what, task.task_id) for what in ("enqueue", "hold", "let go", "dequeue")]
    # A task that has ended need not be handed over any more: what is sent of the rest is in order.
    await until(has_calls(placement, wanted[-1]))
    assert [call for call in wanted if call in placement.calls] == placement.calls


async def test_a_stopped_trial_reaches_placement(admission, placement):
    client = await admission.client()
    task = await client.create()
    request = messages.StopTrialRequest(task_id=task.task_id, trial_id="trial-002")
    for _ in range(2):
        assert (await client.call("StopTrial", request)).trial.state == tuning_pb2.TRIAL_STATE_PENDING
    await until(has_calls(placement, ("stop", "trial-002")))
    await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=task.task_id))
    assert (await client.call("StopTrial", request)).trial.state == tuning_pb2.TRIAL_STATE_CANCELLED
    assert placement.calls.count(("stop", "trial-002")) == 1


async def test_a_task_waits_out_placements_absence(started, placement, monkeypatch):
    monkeypatch.setattr(dispatcher, "LAST_BACKOFF_US", 100_000)
    placement.refuse = AWAY
    admission = await started()
    client = await admission.client()
    task = await client.create()
    waiting = await until(waits_for(client, task, "PLACEMENT_UNREACHABLE"))
    assert waiting.state == tuning_pb2.TASK_STATE_QUEUED
    placement.refuse = None
    await until(has_calls(placement, ("enqueue", task.task_id)))
    await until(waits_for(client, task, "PLANNING"))


async def test_deliveries_survive_a_restart(started, placement):
    placement.refuse = AWAY
    first = await started()
    client = await first.client()
    task = await client.create()
    await first.server.stop()
    placement.refuse = None
    await started()
    await until(has_calls(placement, ("enqueue", task.task_id)))


async def test_a_task_that_no_node_can_hold_is_refused_before_anything_is_kept(admission, placement):
    placement.refuse = (grpc.StatusCode.INVALID_ARGUMENT, "no node has 64 GPUs")
    client = await admission.client()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.create(resources=tuning_pb2.Resources(gpus=64))
    assert (caught.value.code(), reason_in(caught.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "TASK_UNPLACEABLE")
    assert "no node has 64 GPUs" in caught.value.details()
    assert not (await client.call("ListTuningTasks", messages.ListTuningTasksRequest())).tasks


async def test_a_task_that_was_admitted_while_placement_was_away_fails_when_no_node_can_hold_it(admission, placement):
    placement.refuse = AWAY
    client = await admission.client()
    task = await client.create()
    placement.refuse = (grpc.StatusCode.INVALID_ARGUMENT, "no node has 64 GPUs")
    failed = await until(becomes(client, task, state=tuning_pb2.TASK_STATE_FAILED))
    assert (failed.failure.reason, failed.failure.message) == ("TASK_UNPLACEABLE", "no node has 64 GPUs")


async def test_a_tenant_sees_the_forecast_and_of_the_tasks_of_others_only_how_many(admission, placement):
    client = await admission.client()
    mine, other = await client.create(), await client.create()
    forecast = tuning_pb2.TaskForecast(waits_for=[other.task_id, "task-of-somebody-else"], ahead=3)
    forecast.end_time.FromSeconds(2_000_000_000)
    show = dict(state=placement_pb2.PLACEMENT_STATE_WAITING, tenant="acme")

    async def watched():
        return placement.watchers

    await until(watched)
    placement.show(
        placement_pb2.PlannedTask(task_id=mine.task_id, forecast=forecast, **show),
        placement_pb2.PlannedTask(task_id=other.task_id, **show),
        placement_pb2.PlannedTask(task_id="task-of-somebody-else", tenant="umbrella"),
    )

    async def seen():
        request = messages.GetTuningTaskRequest(task_id=mine.task_id)
        task = (await client.call("GetTuningTask", request)).task
        return task.forecast if task.HasField("forecast") else None

    found = await until(seen)
    assert (list(found.waits_for), found.waits_for_others, found.ahead) == ([other.task_id], 1, 3)
    assert found.end_time.seconds == 2_000_000_000


@pytest.fixture
async def impatient(started):
    """A server that waits hardly at all for a task that is missing from the plan."""
    return await started(plan_grace_s=0.2)


def planned(task, state, epoch=0, **fields):
    return placement_pb2.PlannedTask(task_id=task.task_id, state=state, epoch=epoch, **fields)


async def connected(placement):
    async def condition():
        return placement.watchers

    await until(condition)


async def test_the_plan_says_why_and_until_when(admission, placement):
    client = await admission.client()
    task = await client.create()
    await connected(placement)
    await until(waits_for(client, task, "PLANNING"))
    start = timestamp_pb2.Timestamp(seconds=1_800_000_000)
    queue = tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation="All are in use.", predicted_start_time=start)
    placement.show(planned(task, placement_pb2.PLACEMENT_STATE_WAITING, queue=queue))
    waiting = await until(waits_for(client, task, "GPUS_BUSY"))
    assert waiting.queue == queue
    placement.show(planned(task, placement_pb2.PLACEMENT_STATE_ASSIGNED, epoch=1, node_id="n1"))
    assert "n1" in (await until(waits_for(client, task, "STARTING"))).queue.explanation


async def test_an_answer_that_comes_late_does_not_take_back_what_the_plan_says(admission, placement):
    placement.may_answer.clear()
    client = await admission.client()
    task = await client.create()
    await until(has_calls(placement, ("enqueue", task.task_id)))
    queue = tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation="All are in use.")
    placement.show(planned(task, placement_pb2.PLACEMENT_STATE_WAITING, queue=queue))
    await until(waits_for(client, task, "GPUS_BUSY"))
    placement.may_answer.set()

    async def delivered():
        return not await Outbox(admission.server.database).holds(task.task_id)

    await until(delivered)
    assert (await state_of(client, task)).queue == queue


async def test_a_lost_node_queues_its_task_again_but_an_old_plan_does_not(admission, placement):
    client = await admission.client()
    task = await client.create()
    await connected(placement)
    await admission.report(numbered(task.task_id, 2, [execution_started()]))
    await until(becomes(client, task, state=tuning_pb2.TASK_STATE_RUNNING, node_id="n1"))
    queue = tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation="All are in use.")
    placement.show(planned(task, placement_pb2.PLACEMENT_STATE_WAITING, epoch=1, queue=queue))
    await asyncio.sleep(0.3)
    assert (await state_of(client, task)).state == tuning_pb2.TASK_STATE_RUNNING
    placement.show(planned(task, placement_pb2.PLACEMENT_STATE_WAITING, epoch=2, queue=queue))
    again = await until(becomes(client, task, state=tuning_pb2.TASK_STATE_QUEUED))
    assert again.node_id == ""
    await admission.report(numbered(task.task_id, 3, [execution_started("n2", resumed=True)]))
    await until(becomes(client, task, state=tuning_pb2.TASK_STATE_RUNNING, node_id="n2"))


async def test_a_plan_that_says_nothing_new_locks_no_task(admission, placement, monkeypatch):
    client = await admission.client()
    dataset = await client.upload()
    one, other = await handed_over(client, placement, dataset)
    waiting = placement_pb2.PLACEMENT_STATE_WAITING
    start_s = 2_000_000_000

    def plan(explanation, moved_s=0):
        start, end = (timestamp_pb2.Timestamp(seconds=start_s + more_s + moved_s) for more_s in (0, 60))
        said = tuning_pb2.QueueStatus(reason="GPUS_BUSY", predicted_start_time=start, predicted_end_time=end)
        news = tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation=explanation)
        return planned(one, waiting, queue=said), planned(other, waiting, queue=news)

    placement.show(*plan("first"))
    await until(becomes(client, other, queue=tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation="first")))
    await until(waits_for(client, one, "GPUS_BUSY"))
    locked = []
    queued = admission.server.tasks.queued

    async def counted(task_id, epoch, status):
        locked.append(task_id)
        await queued(task_id, epoch, status)

    monkeypatch.setattr(admission.server.tasks, "queued", counted)
    for moved_s, explanation in ((0, "second"), (3, "third")):  # a start that moves by a moment is no news
        placement.show(*plan(explanation, moved_s))
        await until(becomes(client, other, queue=tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation=explanation)))
    assert locked == [other.task_id] * 2
    placement.show(*plan("third", 60))
    await until(has(locked, one.task_id))


async def test_a_task_that_was_given_up_fails(admission, placement):
    client = await admission.client()
    task = await client.create()
    await connected(placement)
    failure = tuning_pb2.Failure(reason="EXECUTION_FAILED", message="three nodes died of it")
    placement.show(planned(task, placement_pb2.PLACEMENT_STATE_GIVEN_UP, failure=failure))
    assert (await until(becomes(client, task, state=tuning_pb2.TASK_STATE_FAILED))).failure == failure


async def test_a_task_whose_news_fails_holds_up_no_other_and_has_them_later(admission, placement, monkeypatch):
    client = await admission.client()
    dataset = await client.upload()
    tasks = await handed_over(client, placement, dataset)
    apply, first = placement_news.apply, []

    def fails(story, planned):
        first[:] = first or [planned.task_id]
        assert planned.task_id not in first, "this news cannot be applied"
        apply(story, planned)

    monkeypatch.setattr(placement_news, "apply", fails)
    failure = tuning_pb2.Failure(reason="EXECUTION_FAILED", message="three nodes died of it")
    placement.show(*(planned(task, placement_pb2.PLACEMENT_STATE_GIVEN_UP, failure=failure) for task in tasks))
    await until(has_some(first))
    broken, sound = sorted(tasks, key=lambda task: task.task_id not in first)
    await until(becomes(client, sound, state=tuning_pb2.TASK_STATE_FAILED))
    assert (await state_of(client, broken)).state == tuning_pb2.TASK_STATE_QUEUED
    monkeypatch.setattr(placement_news, "apply", apply)
    placement.show()
    assert (await until(becomes(client, broken, state=tuning_pb2.TASK_STATE_FAILED))).failure == failure


async def test_a_pause_ends_even_when_the_node_dies_of_it(admission, placement):
    client = await admission.client()
    task = await client.create()
    await connected(placement)
    await admission.report(numbered(task.task_id, 1, [execution_started()]))
    await client.call("PauseTuningTask", messages.PauseTuningTaskRequest(task_id=task.task_id))
    placement.show(planned(task, placement_pb2.PLACEMENT_STATE_HELD, epoch=1))
    await until(becomes(client, task, state=tuning_pb2.TASK_STATE_PAUSED))
    await client.call("ResumeTuningTask", messages.ResumeTuningTaskRequest(task_id=task.task_id))
    await until(has_calls(placement, ("hold", task.task_id), ("let go", task.task_id)))


async def test_a_cancellation_ends_even_when_the_node_dies_of_it(impatient, placement):
    client = await impatient.client()
    task = await client.create()
    await connected(placement)
    await impatient.report(numbered(task.task_id, 1, [execution_started()]))
    await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=task.task_id))
    placement.show()
    await until(becomes(client, task, state=tuning_pb2.TASK_STATE_CANCELLED))


async def test_a_task_that_placement_lost_is_handed_over_again(impatient, placement):
    client = await impatient.client()
    task = await client.create()
    await connected(placement)
    placement.answer = placement_pb2.PLACEMENT_STATE_FINISHED
    await until(has_calls(placement, ("enqueue", task.task_id)))
    placement.show()
    failed = await until(becomes(client, task, state=tuning_pb2.TASK_STATE_FAILED))
    assert "never reported" in failed.failure.message


async def test_reports_after_the_end_are_acknowledged(admission):
    client = await admission.client()
    task = await client.create()
    await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=task.task_id))
    late = [execution_started(), task_state(tuning_pb2.TASK_STATE_SUCCEEDED)]
    assert await admission.report(numbered(task.task_id, 1, late)) == 2
    assert (await state_of(client, task)).state == tuning_pb2.TASK_STATE_CANCELLED
