"""The database edge, on both engines: migrations, transactions, and what SQLite promises after a power cut."""

import asyncio
import gc
import tempfile
import textwrap
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alto_common import database as database_edge
from alto_common.database import Database

ENVIRONMENT = """
from alembic import context
context.configure(connection=context.config.attributes["connection"], target_metadata=None)
with context.begin_transaction():
    context.run_migrations()
"""
REVISION = """
import sqlalchemy as sa
from alembic import op
revision = "0001"
down_revision = None
def upgrade():
    op.create_table("counter", sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.Integer))
"""

counter = sa.table("counter", sa.column("name"), sa.column("value"))


@pytest.fixture
async def database(database_url, tmp_path):
    migrations = tmp_path / "migrations"
    (migrations / "versions").mkdir(parents=True)
    (migrations / "env.py").write_text(textwrap.dedent(ENVIRONMENT))
    (migrations / "versions" / "0001_begin.py").write_text(textwrap.dedent(REVISION))
    opened = Database(database_url, migrations)
    yield opened
    await opened.close()


async def test_a_fresh_database_is_not_current_until_migrated(database):
    assert not await database.is_current()
    await database.migrate()
    assert await database.is_current()
    await database.migrate()
    assert await database.is_current()


async def test_a_transaction_that_raises_leaves_nothing(database):
    await database.migrate()
    with pytest.raises(RuntimeError, match="in the middle"):
        async with database.transaction() as connection:
            await connection.execute(counter.insert().values(name="a", value=1))
            raise RuntimeError("in the middle")
    async with database.snapshot() as connection:
        assert (await connection.execute(sa.select(counter))).all() == []


async def test_writers_queue_and_lose_no_update(database):
    await database.migrate()
    async with database.transaction() as connection:
        await connection.execute(counter.insert().values(name="a", value=0))

    async def increment():
        async with database.transaction() as connection:
            row = sa.select(counter.c.value).where(counter.c.name == "a").with_for_update()
            value = (await connection.execute(row)).scalar_one()
            await connection.execute(counter.update().values(value=value + 1))

    await asyncio.gather(*(increment() for _ in range(20)))
    async with database.snapshot() as connection:
        assert (await connection.execute(sa.select(counter.c.value))).scalar_one() == 20


async def test_transactions_that_lock_one_name_follow_one_another(database):
    await database.migrate()
    locked, order = asyncio.Event(), []

    async def first():
        async with database.transaction() as connection:
            await database.lock(connection, "a")
            locked.set()
            if not database.is_sqlite:  # where every writer waits
                async with database.transaction() as other:
                    await database.lock(other, "b")
            await asyncio.sleep(0.3)
            order.append("first")

    async def second():
        await locked.wait()
        async with database.transaction() as connection:
            await database.lock(connection, "a")
            order.append("second")

    await asyncio.gather(first(), second())
    assert order == ["first", "second"]


class Suspended:
    """Awaits a coroutine and calls `then` when it waits for the `time`-th time and what it waits for has come."""

    def __init__(self, coroutine, time, then):
        self._coroutine = coroutine
        self._left = time
        self._then = then

    def __await__(self):
        inner = self._coroutine.__await__()
        resume, value = inner.send, None
        while True:
            try:
                awaited = resume(value)
            except StopIteration as end:
                return end.value
            self._left -= 1
            if self._left == 0:
                if awaited is None:
                    self._then()
                else:
                    awaited.add_done_callback(lambda _: self._then())
            try:
                resume, value = inner.send, (yield awaited)
            except BaseException as error:
                resume, value = inner.throw, error


async def test_a_cancelled_transaction_lets_others_write_wherever_it_was(database):
    await database.migrate()

    async def write(value):
        async with database.transaction() as connection:
            await connection.execute(counter.delete())
            await connection.execute(counter.insert().values(name="a", value=value))
            await connection.execute(sa.select(counter))

    async def write_until(time):
        await Suspended(write(time), time, asyncio.current_task().cancel)

    time, ended = 0, False
    gc.disable()  # what is left behind must not be in the way until it is collected
    try:
        while not ended:
            time += 1
            writing = asyncio.create_task(write_until(time))
            await asyncio.wait([writing])
            ended = not writing.cancelled()
            async with asyncio.timeout(10):
                await write(-1)
    finally:
        gc.enable()
    assert time > 5


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_cancellation_is_heard_though_the_connection_is_lost_meanwhile(database, database_url):
    await database.migrate()

    async def read(pids):
        async with database.snapshot() as connection:
            pids.append((await connection.exec_driver_sql("SELECT pg_backend_pid()")).scalar_one())
            await asyncio.sleep(10)

    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as operator:
        pids = []
        task = asyncio.create_task(read(pids))
        while not pids:
            await asyncio.sleep(0.01)
        assert operator.execute("SELECT pg_terminate_backend(%s, 10000)", pids).fetchone() == (True,)
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


class Between:
    """A socket of PostgreSQL's that passes everything on to the real one, until it is silenced."""

    def __init__(self, real):
        self._real = real
        self._speaks = asyncio.Event()
        self._speaks.set()
        self._passing = set()

    async def listen(self, folder):
        self._server = await asyncio.start_unix_server(self._connect, folder / ".s.PGSQL.5432")

    def silence(self):
        self._speaks.clear()

    async def close(self):
        self._server.close()
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def _connect(self, reader, writer):
        real_reader, real_writer = await asyncio.open_unix_connection(self._real)
        for one in (self._pass(reader, real_writer), self._pass(real_reader, writer)):
            self._passing.add(asyncio.create_task(one))

    async def _pass(self, reader, writer):
        try:
            while data := await reader.read(1 << 16):
                await self._speaks.wait()
                writer.write(data)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@pytest.fixture
async def between(database_url):
    between = Between(Path(sa.make_url(database_url).query["host"]) / ".s.PGSQL.5432")
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        await between.listen(Path(folder))
        between.url = sa.make_url(database_url).update_query_dict({"host": folder}).render_as_string(False)
        yield between
        await between.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("cancelled", ["nowhere", "between statements", "as it ends"])
async def test_a_reader_leaves_a_server_that_is_silent(database, between, monkeypatch, cancelled):
    monkeypatch.setattr(database_edge, "LAST_WORD_S", 3600 if cancelled == "as it ends" else 0.5)
    await database.migrate()
    through = Database(between.url, Path())
    read, ending = asyncio.Event(), asyncio.Event()

    async def reader():
        async with through.snapshot() as connection:
            rows = (await connection.execute(sa.select(counter))).all()
            between.silence()
            read.set()
            if cancelled == "between statements":
                await asyncio.sleep(3600)
            ending.set()
        return rows

    reading = asyncio.create_task(reader())
    if cancelled != "nowhere":
        await (read if cancelled == "between statements" else ending).wait()
        await asyncio.sleep(0.1)
        reading.cancel()
    async with asyncio.timeout(30):
        await asyncio.wait([reading])
    assert reading.cancelled() if cancelled != "nowhere" else reading.result() == []
    await through.close()


async def test_sqlite_keeps_what_it_acknowledged(tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'alto.db'}", tmp_path)
    async with database.snapshot() as connection:
        assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one() == "wal"
        assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar_one() == 2
        assert (await connection.exec_driver_sql("PRAGMA foreign_keys")).scalar_one() == 1
    await database.close()
