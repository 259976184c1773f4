"""What is kept, on SQLite and on a real PostgreSQL: all or nothing, once, in order."""

import asyncio
import tracemalloc
from dataclasses import replace
from inspect import signature

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import dataset_pb2, error_pb2, tuning_pb2
from alto_admission.adapters import Adapters
from alto_admission.domain import fence
from alto_admission.domain.story import DeliveryKind, Story
from alto_admission.domain.task import Task, Trial
from alto_admission.domain.task_states import CANCELLED, QUEUED, Request
from alto_admission.server import MIGRATIONS
from alto_admission.servicer import AdmissionServicer
from alto_admission.store import schema
from alto_admission.store.datasets import Dataset, DatasetStore, Upload
from alto_admission.store.outbox import Outbox
from alto_admission.store.tasks import TaskFilter, TaskStore
from alto_common.database import Database
from alto_common.errors import DomainError
from alto_common.rpc.authentication import ANONYMOUS, Caller, current_caller

from .reporting import evaluated, progressed, started, trained

NOW_US = 1_700_000_000_000_000
EVENTS_KEPT = 20
MANY_BYTES = 1_000_000


@pytest.fixture
async def database(database_url):
    opened = Database(database_url, MIGRATIONS)
    await opened.migrate()
    yield opened
    await opened.close()


@pytest.fixture
async def tasks(database):
    store = TaskStore(database, lambda: NOW_US, lambda *change: store.changes.append(change), EVENTS_KEPT)
    store.changes = []
    await keep(DatasetStore(database), a_dataset())
    return store


async def keep(datasets, dataset):
    upload = Upload(dataset.tenant, f"upload of {dataset.dataset_id}", "hash", dataset.dataset_id, False, NOW_US, 9)
    await datasets.begin_upload(upload, 1000)
    assert await datasets.finish_upload(dataset)


def a_dataset(dataset_id="d1", tenant="acme", create_us=NOW_US):
    return Dataset(
        dataset_id=dataset_id,
        tenant=tenant,
        display_name="rows",
        format=dataset_pb2.DATASET_FORMAT_TEXT,
        row_count=3,
        size_bytes=9,
        sha256="0" * 64,
        duplicate_count=0,
        create_us=create_us,
        path=f"tenants/{tenant}/datasets/{dataset_id}/rows.jsonl",
    )


def a_story(task_id="task-1", request_id="r1", tenant="acme", create_us=NOW_US, trials=2):
    task = Task(
        task_id=task_id,
        tenant=tenant,
        request_id=request_id,
        request_hash="h",
        spec=b"spec",
        base_model="m",
        dataset_id="d1",
        validation_dataset_id=None,
        trial_count=trials,
        samples_planned=10,
        create_us=create_us,
    )
    story = Story(task, [Trial(task_id, f"t{number}", number, b"config", 4) for number in range(trials)], create_us)
    story.begin()
    return story


async def reason_of(awaitable):
    with pytest.raises(DomainError) as caught:
        await awaitable
    return caught.value.reason


async def test_the_migrations_make_the_tables_of_the_schema(database):
    def differences(connection):
        return compare_metadata(MigrationContext.configure(connection), schema.metadata)

    async with database.snapshot() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_task_comes_back_as_it_was_kept(tasks):
    story = a_story()
    assert await tasks.create(story, {"team": "nlp"})
    task, trials = await tasks.with_trials("task-1", "acme")
    assert task == story.task
    assert trials == list(story.trials.values())
    assert await tasks.events_after("task-1", 0, 10) == story.events
    assert tasks.changes == [("task-1", 1)]


async def test_a_request_id_makes_one_task_however_many_calls_race(tasks, database):
    stories = [a_story(f"task-{number}") for number in range(8)]
    made = await asyncio.gather(*(tasks.create(story, {}) for story in stories))
    assert sum(made) == 1
    kept = await tasks.by_request("acme", "r1")
    assert kept.task_id == stories[made.index(True)].task.task_id
    assert len(await tasks.unfinished()) == 1
    assert len(await Outbox(database).due(NOW_US, 10)) == 1


async def test_the_quota_holds_however_many_calls_race(tasks):
    stories = [a_story(f"task-{number}") for number in range(6)]
    for number, story in enumerate(stories):
        story.task.request_id = f"r{number}"
    made = await asyncio.gather(*(tasks.create(story, {}, 2) for story in stories), return_exceptions=True)
    assert made.count(True) == 2
    refused = [found for found in made if found is not True]
    assert all(isinstance(found, DomainError) and "the quota is 2 tasks" in str(found) for found in refused)
    again = stories[made.index(True)]
    assert await tasks.create(again, {}, 2) is False


async def test_a_request_id_belongs_to_its_tenant(tasks, database):
    await keep(DatasetStore(database), replace(a_dataset(), dataset_id="d2", tenant="other"))
    other = a_story("task-2", tenant="other")
    other.task.dataset_id = "d2"
    assert await tasks.create(a_story(), {})
    assert await tasks.create(other, {})


async def test_a_task_of_a_dataset_that_is_gone_is_not_kept(tasks):
    story = a_story()
    story.task.dataset_id = "gone"
    assert await reason_of(tasks.create(story, {})) == error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND
    assert await tasks.by_request("acme", "r1") is None


async def test_another_tenant_sees_nothing(tasks):
    await tasks.create(a_story(), {})
    not_found = error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND
    assert await reason_of(tasks.get("task-1", "other")) == not_found
    assert await reason_of(tasks.with_trials("task-1", "other")) == not_found
    assert await tasks.page("other", TaskFilter(), None, 10, MANY_BYTES) == ([], False)
    with pytest.raises(DomainError):
        async with tasks.story("task-1", "other"):
            pytest.fail("opened another tenant's task")


async def test_a_story_is_kept_whole_or_not_at_all(tasks, database):
    await tasks.create(a_story(), {})
    with pytest.raises(RuntimeError, match="in the middle"):
        async with tasks.story("task-1") as story:
            story.request(Request.CANCEL)
            raise RuntimeError("in the middle")
    assert (await tasks.get("task-1")).state == QUEUED
    assert len(await tasks.events_after("task-1", 0, 10)) == 1
    async with tasks.story("task-1") as story:
        story.request(Request.CANCEL)
    task, trials = await tasks.with_trials("task-1", "acme")
    assert (task.state, task.revision, task.last_event_sequence) == (CANCELLED, 2, 4)
    assert {trial.state for trial in trials} == {tuning_pb2.TRIAL_STATE_CANCELLED}
    assert await tasks.unfinished() == []


async def test_a_story_in_which_nothing_happens_changes_nothing(tasks):
    await tasks.create(a_story(), {})
    async with tasks.story("task-1"):
        pass
    assert (await tasks.get("task-1")).etag == "r1"


async def test_writers_of_one_task_queue_and_leave_no_gap(tasks):
    await tasks.create(a_story(), {})

    async def report(number):
        async with tasks.story("task-1") as story:
            story.reported(1, progressed(number / 100))
            story.reported(1, trained("t0", number + 1))

    await asyncio.gather(*(report(number) for number in range(8)))
    events = await tasks.events_after("task-1", 0, 100)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


async def test_a_repeated_report_is_passed_over_and_an_older_epoch_refused(tasks):
    await tasks.create(a_story(), {})
    for epoch in (1, 2, 2):
        async with tasks.story("task-1") as story:
            if fence.admit(story.task, epoch, 1):
                story.reported(epoch, started())
    with pytest.raises(DomainError, match="superseded"):
        async with tasks.story("task-1") as story:
            fence.admit(story.task, 1, 2)
    task = await tasks.get("task-1")
    assert (task.epoch, task.reported_sequence) == (2, 1)
    kinds = [event.WhichOneof("payload") for event in await tasks.events_after("task-1", 0, 100)]
    assert kinds == ["task_state_changed", "task_state_changed", "execution_started", "execution_started"]


async def test_a_step_is_one_point_of_the_curve(tasks):
    await tasks.create(a_story(), {})
    for _ in range(2):
        async with tasks.story("task-1") as story:
            for step in (1, 2):
                story.reported(1, trained("t0", step))
            story.reported(1, evaluated("t0", 2, 0.5))
            story.reported(1, evaluated("t0", 2, 0.5))
    points = await tasks.metrics("task-1", "t0", -1, 10)
    assert [(point.step, point.train_loss, point.validation_loss) for point in points] == [
        (1, 2.0, None),
        (2, 1.0, 0.5),
    ]
    assert [point.step for point in await tasks.metrics("task-1", "t0", 1, 10)] == [2]


async def test_old_events_go(tasks):
    await tasks.create(a_story(), {})
    for number in range(60):
        async with tasks.story("task-1") as story:
            story.reported(1, progressed(number / 60))
    task = await tasks.get("task-1")
    events = await tasks.events_after("task-1", 0, 100)
    assert events[0].sequence == task.earliest_event_sequence
    assert EVENTS_KEPT <= len(events) <= EVENTS_KEPT * 5 // 4
    assert events[-1].sequence == task.last_event_sequence == 61


async def test_pages_of_tasks_by_state_and_label(tasks):
    for number in range(5):
        # Two of one moment: the id decides.
        story = a_story(f"task-{number}", f"r{number}", create_us=NOW_US + number // 2)
        await tasks.create(story, {"team": "nlp" if number % 2 else "cv"})
    async with tasks.story("task-3") as story:
        story.request(Request.CANCEL)
    everything, more = await tasks.page("acme", TaskFilter(), None, 5, MANY_BYTES)
    assert [task.task_id for task in everything] == ["task-4", "task-3", "task-2", "task-1", "task-0"]
    assert not more
    after, paged, sizes, more = None, [], [], True
    while more:
        page, more = await tasks.page("acme", TaskFilter(), after, 2, MANY_BYTES)
        after = (page[-1].create_us, page[-1].task_id)
        paged += page
        sizes.append(len(page))
    assert (paged, sizes) == (everything, [2, 2, 1])
    queued = TaskFilter(states=(QUEUED,), labels=(("team", "nlp"),))
    found, _ = await tasks.page("acme", queued, None, 10, MANY_BYTES)
    assert [task.task_id for task in found] == ["task-1"]


async def test_of_a_page_no_more_is_read_than_fits(tasks):
    for number in range(12):
        story = a_story(f"task-{number:02}", f"r{number}", trials=12)
        story.task.spec = bytes(1_000_000)
        if number == 11:
            for trial in story.trials.values():
                trial.config, trial.adapter = bytes(400_000), bytes(600_000)
        await tasks.create(story, {})
    tracemalloc.start()
    page, more = await tasks.page("acme", TaskFilter(), None, 12, 3_100_000)
    assert ([task.task_id for task in page], more) == (["task-11", "task-10", "task-09"], True)
    trials, more = await tasks.page_of_trials("task-11", 1, 12, 3_100_000)
    assert ([trial.position for trial in trials], more) == ([2, 3, 4], True)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10_000_000
    trials, more = await tasks.page_of_trials("task-11", 8, 12, 3_100_000)
    assert ([trial.position for trial in trials], more) == ([9, 10, 11], False)
    larger_than_a_page, more = await tasks.page("acme", TaskFilter(), None, 12, 10)
    assert (len(larger_than_a_page), more) == (1, True)


async def test_texts_count_in_a_page_by_their_bytes_not_their_characters(tasks):
    for number in range(3):
        story = a_story(f"task-{number}", f"r{number}", trials=3)
        story.task.queue_explanation = "待" * 1000
        for trial in story.trials.values():
            trial.failure_message = "é" * 1000
        await tasks.create(story, {})
    page, more = await tasks.page("acme", TaskFilter(), None, 3, 6500)
    assert (len(page), more) == (2, True)
    trials, more = await tasks.page_of_trials("task-0", -1, 3, 4500)
    assert (len(trials), more) == (2, True)


async def test_of_a_trial_that_is_asked_for_neither_its_task_nor_its_neighbours_are_read(tasks):
    story = a_story(trials=20)
    story.task.spec = bytes(10_000_000)
    wanted, *others = story.trials.values()
    wanted.config, wanted.adapter = b"", b""
    for trial in others:
        trial.failure_message = "x" * 500_000
    await tasks.create(story, {})
    parts = dict.fromkeys(signature(AdmissionServicer).parameters)
    servicer = AdmissionServicer(**parts | {"tasks": tasks, "adapters": Adapters(tasks, None)})

    async def ask(tenant):
        current_caller.set(Caller(tenant, frozenset()))
        one = {"task_id": "task-1", "trial_id": "t0"}
        yield servicer.GetTrial(messages.GetTrialRequest(**one), None)
        yield servicer.ListTrialMetrics(messages.ListTrialMetricsRequest(**one), None)
        yield servicer.ListTrials(messages.ListTrialsRequest(task_id="task-1", page_size=1), None)
        yield anext(servicer.DownloadAdapter(messages.DownloadAdapterRequest(**one), None))
        current_caller.set(ANONYMOUS)

    tracemalloc.start()
    answers = [await asked async for asked in ask("acme")]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    trial, curve, page, adapter = answers
    assert trial.trial.trial_id == page.trials[0].trial_id == adapter.header.trial_id == "t0"
    assert (list(curve.metrics), bool(page.next_page_token)) == ([], True)
    assert peak_bytes < 2_000_000
    reasons = [await reason_of(asked) async for asked in ask("other")]
    assert reasons == [error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND] * 4


async def test_why_a_task_waits_is_kept_without_its_trials(tasks):
    story = a_story(trials=20)
    for trial in story.trials.values():
        trial.failure_message = "x" * 500_000
    await tasks.create(story, {})
    async with tasks.story("task-1") as now:
        now.trials["t3"].best_validation_loss = 0.5
        now.trials["t3"].samples_trained = 7
    status = tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation="Every place is in use.")
    tracemalloc.start()
    await tasks.queued("task-1", 0, status)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000
    task, trials = await tasks.with_trials("task-1", "acme")
    assert (task.queue_reason, task.queue_explanation) == (status.reason, status.explanation)
    assert (task.best_trial_id, task.samples_trained, trials[3].samples_trained) == ("t3", 7, 7)
    assert tasks.changes[-1] == ("task-1", task.last_event_sequence)
    (event,) = await tasks.events_after("task-1", task.last_event_sequence - 1, 10)
    assert event.task_queued.queue == status
    await tasks.queued("task-1", 0, status)
    assert await tasks.get("task-1") == task, "that is no news"


async def test_why_a_task_waited_is_not_kept_when_it_waits_no_more_or_ran_since(tasks):
    await tasks.create(a_story(), {})
    async with tasks.story("task-1") as story:
        story.task.epoch = 2
    for epoch in (1, 2):
        await tasks.queued("task-1", epoch, tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation=f"of {epoch}"))
    assert (await tasks.get("task-1")).queue_explanation == "of 2"
    async with tasks.story("task-1") as story:
        story.request(Request.CANCEL)
    before = await tasks.get("task-1")
    await tasks.queued("task-1", 2, tuning_pb2.QueueStatus(reason="GPUS_BUSY", explanation="again"))
    assert await tasks.get("task-1") == before


async def test_how_tasks_stand_is_read_without_what_they_are(tasks):
    story = a_story()
    story.task.spec = bytes(10_000_000)
    await tasks.create(story, {})
    tracemalloc.start()
    standing = await tasks.standing("task-1", "acme")
    assert await tasks.unfinished() == [standing]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000
    assert (standing.task_id, standing.state, standing.last_event_sequence) == ("task-1", QUEUED, 1)


async def test_deliveries_wait_for_those_before_them(tasks, database):
    outbox = Outbox(database)
    await tasks.create(a_story(), {})
    await tasks.create(a_story("task-2", "r2"), {})
    async with tasks.story("task-1") as story:
        story.request(Request.PAUSE)
    first, other = await outbox.due(NOW_US, 10)
    assert (first.task_id, first.kind, other.task_id) == ("task-1", DeliveryKind.ENQUEUE, "task-2")
    claimed = await outbox.claim(first, NOW_US + 5)
    assert claimed
    assert not await outbox.claim(first, NOW_US + 5), "another dispatcher was quicker"
    assert [one.task_id for one in await outbox.due(NOW_US, 10)] == ["task-2"]
    assert await outbox.next_due_us() == 0
    await outbox.retry_at(claimed, NOW_US + 2)
    (again,) = [one for one in await outbox.due(NOW_US + 3, 10) if one.task_id == "task-1"]
    assert (again.kind, again.attempts) == (DeliveryKind.ENQUEUE, 1)
    await outbox.delivered(again)
    (update,) = [one for one in await outbox.due(NOW_US, 10) if one.task_id == "task-1"]
    assert update.kind == DeliveryKind.UPDATE
    assert await outbox.holds("task-1")


async def test_what_comes_of_a_claim_that_has_ended_is_for_who_claimed_it_since(tasks, database):
    outbox = Outbox(database)
    await tasks.create(a_story(), {})
    (delivery,) = await outbox.due(NOW_US, 10)
    slow = await outbox.claim(delivery, NOW_US + 5)
    (delivery,) = await outbox.due(NOW_US + 5, 10)
    quick = await outbox.claim(delivery, NOW_US + 10)
    await outbox.retry_at(slow, NOW_US)
    await outbox.delivered(slow)
    assert (await outbox.next_due_us(), quick.attempts) == (NOW_US + 10, 2)
    await outbox.delivered(quick)
    assert await outbox.size() == 0


async def test_a_dataset_in_use_stays(tasks, database):
    datasets = DatasetStore(database)
    await tasks.create(a_story(), {})
    assert await reason_of(datasets.delete("d1", "acme")) == error_pb2.ERROR_REASON_DATASET_IN_USE
    assert await reason_of(datasets.delete("d1", "other")) == error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND
    async with tasks.story("task-1") as story:
        story.request(Request.CANCEL)
    await datasets.delete("d1", "acme")
    assert await reason_of(datasets.get("d1", "acme")) == error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND


async def test_an_upload_has_one_dataset(tasks, database):
    datasets = DatasetStore(database)
    first = Upload("acme", "u1", "hash", "d7", False, NOW_US, 9)
    assert await datasets.begin_upload(first, 100) == first
    assert await datasets.begin_upload(replace(first, dataset_id="d8"), 100) == first
    for _ in range(2):
        assert await datasets.finish_upload(a_dataset("d7"))
    assert (await datasets.upload("acme", "u1")).complete
    await datasets.delete("d7", "acme")
    assert await datasets.upload("acme", "u1") is None
    assert not await datasets.finish_upload(a_dataset("d7")), "what was deleted does not come back"


async def test_an_upload_that_was_under_way_before_quotas_goes_on(database_url):
    before = Database(database_url, MIGRATIONS)
    config = before._config()
    async with before.engine.begin() as connection:

        def upgrade(connection):
            config.attributes["connection"] = connection
            command.upgrade(config, "0001")

        await connection.run_sync(upgrade)
        values = {"tenant": "acme", "request_id": "u1", "request_hash": "hash", "dataset_id": "d7", "create_us": NOW_US}
        await connection.execute(
            sa.insert(sa.table("uploads", *map(sa.column, (*values, "complete")))).values(**values, complete=False)
        )
    await before.migrate()
    datasets = DatasetStore(before)
    upload = await datasets.begin_upload(Upload("acme", "u1", "hash", "d8", False, NOW_US, 9), 1)
    assert upload == Upload("acme", "u1", "hash", "d7", False, NOW_US, 0)
    assert await datasets.finish_upload(a_dataset("d7"))
    assert await datasets.used_bytes("acme") == 9
    await before.close()


async def test_only_an_upload_that_nobody_carries_on_is_forgotten(tasks, database):
    datasets = DatasetStore(database)
    old = Upload("acme", "u1", "hash", "d7", False, NOW_US, 9)
    await datasets.begin_upload(old, 100)
    await datasets.begin_upload(replace(old, dataset_id="d8", create_us=NOW_US + 5), 100)
    assert not await datasets.unfinished_uploads(NOW_US + 5)
    assert not await datasets.forget_upload(old, NOW_US + 5)
    assert await datasets.finish_upload(a_dataset("d7"))
    assert not await datasets.forget_upload(old), "its request_id goes on to return its dataset"
    another = replace(old, request_id="u2", dataset_id="d9")
    await datasets.begin_upload(another, 100)
    assert await datasets.forget_upload(another, NOW_US + 1)
    assert not await datasets.finish_upload(a_dataset("d9"))
    assert {dataset.dataset_id for dataset in await datasets.page("acme", None, 10)} == {"d1", "d7"}


async def test_an_unfinished_upload_is_given_up_under_the_id_of_its_dataset(tasks, database):
    datasets = DatasetStore(database)
    # Nine bytes are there already.
    older = Upload("acme", "u1", "hash", "d7", False, NOW_US, 10)
    newer = replace(older, request_id="u2", dataset_id="d8", create_us=NOW_US + 1)
    for upload in (newer, older):
        await datasets.begin_upload(upload, 29)
    assert await datasets.oldest_unfinished("acme", 10) == [older, newer]
    assert await datasets.oldest_unfinished("acme", 1) == [older]
    assert await datasets.oldest_unfinished("other", 10) == []
    assert await reason_of(datasets.delete("d7", "other")) == error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND
    await datasets.delete("d7", "acme")
    assert await datasets.used_bytes("acme") == 19
    assert await datasets.upload("acme", "u1") is None
    assert not await datasets.finish_upload(a_dataset("d7")), "what was given up does not come back"
    assert await reason_of(datasets.delete("d7", "acme")) == error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND


async def test_an_upload_that_ends_while_it_is_given_up_leaves_nothing(tasks, database):
    datasets = DatasetStore(database)
    for number in range(10):
        dataset = a_dataset(f"of-{number}")
        await datasets.begin_upload(Upload("acme", f"u{number}", "hash", dataset.dataset_id, False, NOW_US, 9), 1000)
        await asyncio.gather(datasets.finish_upload(dataset), datasets.delete(dataset.dataset_id, "acme"))
        assert await reason_of(datasets.get(dataset.dataset_id, "acme")) == error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND
    assert await datasets.used_bytes("acme") == 9


async def test_uploads_that_begin_at_once_stay_within_the_quota_together(tasks, database):
    datasets = DatasetStore(database)
    # Nine bytes are there already.
    coming = [Upload("acme", f"u{number}", "hash", f"d{number}", False, NOW_US, 10) for number in range(10, 20)]
    begun = await asyncio.gather(*(datasets.begin_upload(upload, 39) for upload in coming), return_exceptions=True)
    refused = [one for one in begun if isinstance(one, DomainError)]
    assert len(refused) == 7
    assert {error.reason for error in refused} == {error_pb2.ERROR_REASON_QUOTA_EXCEEDED}
    assert await datasets.used_bytes("acme") == 39
    assert await datasets.begin_upload(replace(coming[0], tenant="other", dataset_id="d99"), 39)
    (unfinished, *_) = await datasets.unfinished_uploads(NOW_US + 1)
    assert not await datasets.unfinished_uploads(NOW_US)
    assert await datasets.forget_upload(unfinished)
    assert await datasets.used_bytes("acme") + await datasets.used_bytes("other") == 39


async def test_pages_of_datasets(tasks, database):
    datasets = DatasetStore(database)
    await keep(datasets, a_dataset("d2"))
    await keep(datasets, a_dataset("d3", create_us=NOW_US + 1))
    first = await datasets.page("acme", None, 2)
    assert [dataset.dataset_id for dataset in first] == ["d3", "d2"]
    rest = await datasets.page("acme", (first[-1].create_us, first[-1].dataset_id), 2)
    assert [dataset.dataset_id for dataset in rest] == ["d1"]
