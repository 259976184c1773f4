"""A database that has no connection to spare, cannot be reached, or is lost: callers hear when to try again."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import psycopg
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import placement_pb2, tuning_pb2
from alto_admission.store.outbox import Outbox
from alto_common import database as database_edge
from alto_common.errors import DomainError
from alto_common.rpc.status import reason_in
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from .test_placement_link import becomes, planned, until


@pytest.fixture
async def admission(database_url, started, monkeypatch):
    """A server on either database whose calls wait hardly at all for a connection."""
    monkeypatch.setattr(database_edge, "CONNECTION_WAIT_S", 0.5)
    return await started(database_url=database_url)


async def list_tasks(client):
    return await client.call("ListTuningTasks", messages.ListTuningTasksRequest())


async def is_told_to_try_again(client):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await list_tasks(client)
    retry = error_details_pb2.RetryInfo()
    assert (caught.value.code(), reason_in(caught.value)) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(caught.value).details)
    assert retry.retry_delay.ToMilliseconds() > 0


async def test_every_connection_is_in_use(admission):
    client = await admission.client()
    async with AsyncExitStack() as stack:
        with pytest.raises(DomainError):
            while True:
                await stack.enter_async_context(admission.server.database.snapshot())
        await is_told_to_try_again(client)
    assert not (await list_tasks(client)).tasks


on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def lost(database_url, postgres_uri):
    """While open, every connection that comes to a table is lost there."""
    end_waiting_ones = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"

    @asynccontextmanager
    async def lost(table):
        async def end():
            while True:
                operator.execute(end_waiting_ones)
                await asyncio.sleep(0.02)

        with (
            psycopg.connect(database_url.replace("+psycopg", "")) as holder,
            psycopg.connect(postgres_uri, autocommit=True) as operator,
        ):
            holder.execute(f"LOCK TABLE {table}")
            ending = asyncio.create_task(end())
            yield
            ending.cancel()

    return lost


@on_postgresql
async def test_the_database_cannot_be_reached(admission, refused):
    client = await admission.client()
    async with refused():
        await is_told_to_try_again(client)
    assert not (await list_tasks(client)).tasks


@on_postgresql
async def test_the_database_is_lost_in_the_middle_of_a_call(admission, lost):
    client = await admission.client()
    async with lost("api_keys"):
        await is_told_to_try_again(client)
    assert not (await list_tasks(client)).tasks


@pytest.fixture
def away(request):
    """While open, the database is away: from the beginning, or from the middle of what changes a task on."""
    if request.param == "refused":
        return request.getfixturevalue("refused")()
    return request.getfixturevalue("lost")("trials")


@on_postgresql
@pytest.mark.parametrize("away", ["refused", "lost"], indirect=True)
async def test_tasks_that_are_given_up_meanwhile_fail_when_it_is_back(admission, placement, away):
    client = await admission.client()
    dataset = await client.upload()
    tasks = [await client.create(dataset.dataset_id) for _ in range(2)]
    failure = tuning_pb2.Failure(reason="EXECUTION_FAILED", message="three nodes died of it")

    async def settled():
        return placement.watchers and not await Outbox(admission.server.database).size()

    def tried(times):
        async def condition():
            return sum(line["event"] == "cannot take the plan over" for line in logs) >= times

        return condition

    await until(settled)
    with capture_logs() as logs:
        async with away:
            for times, task in enumerate(tasks, start=1):
                # In one plan each: no later one has it.
                placement.show(planned(task, placement_pb2.PLACEMENT_STATE_GIVEN_UP, failure=failure))
                await until(tried(times))
    for task in tasks:
        assert (await until(becomes(client, task, state=tuning_pb2.TASK_STATE_FAILED))).failure == failure


@on_postgresql
@pytest.mark.parametrize("what", ["enqueue", "dequeue"])  # with something to keep of the answer, and with nothing
async def test_what_placement_answers_meanwhile_does_not_wait_for_the_end_of_a_claim(
    admission, placement, refused, monkeypatch, what
):
    client = await admission.client()
    outbox, writes = Outbox(admission.server.database), []

    def counting(write):
        async def counted(self, *arguments):
            writes.append(write.__name__)
            await write(self, *arguments)

        return counted

    for write in (Outbox.retry_at, Outbox.delivered):
        monkeypatch.setattr(Outbox, write.__name__, counting(write))

    async def settled():
        return not await outbox.size()

    async def asked():
        return (what, task.task_id) in placement.calls

    task = await client.create()
    await until(settled)
    placement.may_answer.clear()
    if what == "enqueue":
        task = await client.create(task.spec.dataset_id)
    else:
        await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=task.task_id))
    await until(asked)
    writes.clear()
    async with refused():
        placement.may_answer.set()
        async with asyncio.timeout(10):
            while not writes:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
    await until(settled)
    assert writes[0] == ("retry_at" if what == "enqueue" else "delivered")
    assert len(writes) > 1
