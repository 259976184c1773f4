"""A database that has no connection to spare, cannot be reached, or is lost: callers hear when to try again."""

import asyncio
from contextlib import AsyncExitStack

import grpc
import psycopg
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto_common import database as database_edge
from alto_common.errors import DomainError
from alto_common.rpc.status import reason_in
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy import make_url


@pytest.fixture
async def admission(started, database_url, monkeypatch):
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


@on_postgresql
async def test_the_database_cannot_be_reached(admission, database_url, postgres_uri):
    client = await admission.client()
    name = make_url(database_url).database
    with psycopg.connect(postgres_uri, autocommit=True) as operator:
        operator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        operator.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [name])
        await is_told_to_try_again(client)
        operator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert not (await list_tasks(client)).tasks


@on_postgresql
async def test_the_database_is_lost_in_the_middle_of_a_call(admission, database_url, postgres_uri):
    client = await admission.client()
    end_a_waiting_one = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with (
        psycopg.connect(database_url.replace("+psycopg", "")) as holder,
        psycopg.connect(postgres_uri, autocommit=True) as operator,
    ):
        holder.execute("LOCK TABLE api_keys")
        call = asyncio.ensure_future(is_told_to_try_again(client))
        async with asyncio.timeout(10):
            while not operator.execute(end_a_waiting_one).fetchall():
                await asyncio.sleep(0.02)
        await call
    assert not (await list_tasks(client)).tasks
