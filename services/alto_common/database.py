"""The database edge: one engine for SQLite or PostgreSQL, transactions, migrations.

What was acknowledged survives a power cut: SQLite runs in WAL mode with synchronous=FULL.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from alto_common.errors import unavailable

SQLITE_BUSY_TIMEOUT_MS = 30_000
# Shorter than callers' deadlines: they hear why, and when to try again.
CONNECTION_WAIT_S = 10.0
# What a reader that is done waits for a server that is silent, before psycopg is told to give up: 10 s more.
LAST_WORD_S = 5.0

log = structlog.get_logger("alto.database")


class Database:
    """An engine and the migrations of one service. `migrations` is the folder of its Alembic scripts.

    Raises ValueError, or what SQLAlchemy raises, for a URL that will not do.
    """

    def __init__(self, url: str, migrations: Path) -> None:
        if not url.startswith("sqlite") and url.partition("?")[0].count("@") > 1:
            # What is behind the first @ would be taken for the host, and told as that.
            raise ValueError("write an @ inside a user name or a password as %40")
        self.engine: AsyncEngine = create_async_engine(url, pool_pre_ping=True, pool_timeout=CONNECTION_WAIT_S)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._migrations = migrations
        if self.is_sqlite:
            event.listen(self.engine.sync_engine, "connect", _set_sqlite_pragmas)
            event.listen(self.engine.sync_engine, "begin", _begin_sqlite)
            event.listen(self.engine.sync_engine, "close", _roll_back_sqlite)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction; it commits when the block ends and rolls back when the block raises.

        On SQLite it takes the write lock at once (BEGIN IMMEDIATE), so that two writers queue instead of failing.
        Raises UNAVAILABLE.
        """
        async with self._connected() as connection, connection.begin():
            yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Open a connection for reading; nothing is kept. Raises UNAVAILABLE."""
        async with self._connected() as connection:
            if self.is_sqlite:
                connection = await connection.execution_options(alto_read_only=True)
            try:
                yield connection
            finally:
                # Closing would do so too, but in a task of its own that waits for a silent server for ever.
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORD_S):
                        await connection.rollback()

    async def lock(self, connection: AsyncConnection, name: str) -> None:
        """Let the transactions that lock one name follow one another, each to its end; others are not held up.

        On SQLite, which has one writer at a time, they do so anyway.
        """
        if not self.is_sqlite:
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(name))))

    async def migrate(self) -> None:
        """Bring the schema to the latest revision."""
        async with self.engine.begin() as connection:
            await connection.run_sync(self._upgrade)

    async def is_current(self) -> bool:
        """Return whether the database answers and its schema is the latest revision."""
        async with self.snapshot() as connection:
            return await connection.run_sync(self._has_head)

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        """Open a connection. Raises UNAVAILABLE when all are in use, or the database cannot be reached, or is lost.

        Whoever is cancelled hears nothing else.
        """
        try:
            async with self.engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            if _is_being_cancelled():
                # Closing a connection that is lost raises this in the place of the cancellation.
                raise asyncio.CancelledError from error
            if not _is_away(error):
                raise
            log.warning("the database is away", error=str(error))
            raise unavailable("the database cannot be reached, or is too busy, at the moment") from error

    def _config(self) -> Config:
        config = Config()
        config.set_main_option("script_location", str(self._migrations))
        return config

    def _upgrade(self, connection: Connection) -> None:
        config = self._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    def _has_head(self, connection: Connection) -> bool:
        heads = ScriptDirectory.from_config(self._config()).get_heads()
        return set(MigrationContext.configure(connection).get_current_heads()) == set(heads)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _is_away(error: SQLAlchemyError) -> bool:
    """Say whether there was no connection, or none any more, or SQLite's one writer; else a statement failed."""
    if isinstance(error, PoolTimeoutError) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return True
    if not isinstance(error, OperationalError):
        return False
    return error.statement is None or "database is locked" in str(error.orig)


def _set_sqlite_pragmas(connection: Any, _record: Any) -> None:
    # The driver must not begin transactions by itself: _begin_sqlite does.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_TIMEOUT_MS}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("alto_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _roll_back_sqlite(connection: Any, _record: Any) -> None:
    # One that is closed in the middle of a transaction, since its caller was cancelled, would keep the write lock for
    # as long as anything, such as the traceback of the cancellation, holds on to a cursor of it.
    with suppress(sqlite3.Error):
        connection.rollback()
