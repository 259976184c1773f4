"""What the store keeps and what it refuses, on SQLite and on a real PostgreSQL."""

import asyncio
import json
from dataclasses import asdict, replace

import pytest
from alembic import command
from alto_common.database import Database
from alto_placement.state import (
    AssignmentRow,
    Changes,
    FailureCause,
    NodeRow,
    NodeSpec,
    Outcome,
    StopReason,
    TaskRow,
    TaskState,
    WorkSize,
)
from alto_placement.store import MIGRATIONS, PlacementStore, StoreConflictError, metadata
from sqlalchemy import MetaData, inspect, text

NODE = NodeRow(NodeSpec("node-a", "h100", 8, 80 << 30, "host:7413", "1"), "start-1", superseded=("start-0",))
TASK = TaskRow("task", "acme", b"\x00work", "tiny", 2, "h100", WorkSize(10, 2, 3, 4, 5, 0.5), 1e9, priority=3)
FIRST = AssignmentRow("assignment-1", "task", 1, "node-a", "start-1", (0, 1), 1e9 + 1)
GIVEN = replace(TASK, epoch=1, attempts=1, assignment_id="assignment-1", stopped_trial_ids=("trial-1",))


@pytest.fixture
async def store(database_url):
    database = Database(database_url, MIGRATIONS)
    await database.migrate()
    yield PlacementStore(database)
    await database.close()


@pytest.fixture
async def given(store):
    """A store that holds a node, a task and its live assignment."""
    await store.save(Changes((NODE,), (TASK,), new_task_ids=frozenset({"task"})))
    await store.save(Changes((), (GIVEN,), (FIRST,), new_assignment_ids=frozenset({"assignment-1"})))
    return store


async def test_the_migration_makes_the_tables_of_the_store(store):
    def found(connection):
        tables = {name: {c["name"] for c in inspect(connection).get_columns(name)} for name in metadata.tables}
        indices = {index["name"] for index in inspect(connection).get_indexes("assignments")}
        return tables, indices

    async with store.database.snapshot() as connection:
        tables, indices = await connection.run_sync(found)
    assert tables == {name: {c.name for c in table.columns} for name, table in metadata.tables.items()}
    assert "assignments_one_live" in indices


async def test_rows_of_the_first_schema_come_through_all_migrations(database_url):
    database = Database(database_url, MIGRATIONS)
    newer = {"leaving", "ran_on", "keeps_turn", "alone", "host_assignment_id"}

    def begin(connection):
        config = database._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        old = MetaData()
        old.reflect(connection)
        for name, values in (
            ("nodes", {**asdict(NODE.spec), **asdict(NODE), "superseded": '["start-0"]'}),
            ("tasks", {**asdict(GIVEN), "size": json.dumps(asdict(GIVEN.size)), "stopped_trial_ids": '["trial-1"]'}),
            ("assignments", {**asdict(FIRST), "gpu_indices": "[0, 1]"}),
        ):
            columns = {column.name for column in metadata.tables[name].columns} - newer
            assert columns == {column.name for column in old.tables[name].columns}
            names = ", ".join(sorted(columns))
            marks = ", ".join(f":{column}" for column in sorted(columns))
            connection.execute(
                text(f"INSERT INTO {name} ({names}) VALUES ({marks})"), {column: values[column] for column in columns}
            )

    async with database.engine.begin() as connection:
        await connection.run_sync(begin)
    await database.migrate()
    state = await PlacementStore(database).load(ended_since_s=0.0)
    assert (state.nodes, state.tasks, state.assignments) == (
        {"node-a": NODE},
        {"task": GIVEN},
        {"assignment-1": FIRST},
    )
    await database.close()


async def test_everything_comes_back_as_it_was(given):
    state = await given.load(ended_since_s=0.0)
    assert state.nodes == {"node-a": NODE}
    assert state.tasks == {"task": GIVEN}
    assert state.assignments == {"assignment-1": FIRST}


async def test_a_node_is_forgotten_with_what_has_ended_on_it(given):
    with pytest.raises(StoreConflictError):
        await given.save(Changes(forgotten_node_ids=("node-a",)))
    assert (await given.load(0.0)).nodes == {"node-a": NODE}
    over = replace(FIRST, outcome=Outcome.LOST, ended_s=1e9 + 9)
    waits = replace(GIVEN, assignment_id="", ran_on="node-a")
    await given.save(Changes((), (waits,), (over,)))
    await given.save(Changes(forgotten_node_ids=("node-a",)))
    state = await given.load(0.0)
    assert (state.nodes, state.tasks) == ({}, {"task": waits})
    assert await given.assignments_of("task") == []


async def test_ended_assignments_and_old_tasks_are_not_loaded(given):
    over = replace(FIRST, stop=StopReason.CANCELLED, outcome=Outcome.STOPPED, ended_s=1e9 + 9)
    cause = FailureCause("EXECUTION_FAILED", "it crashed")
    done = replace(GIVEN, assignment_id="", ended=TaskState.GIVEN_UP, ended_s=1e9 + 9, failure=cause)
    await given.save(Changes((), (done,), (over,)))
    assert (await given.load(ended_since_s=1e9)).tasks == {"task": done}
    state = await given.load(ended_since_s=1e9 + 10)
    assert (state.tasks, state.assignments) == ({}, {})
    assert await given.task("task") == done
    assert await given.assignments_of("task") == [over]


async def test_a_second_live_assignment_is_refused_whole(given):
    second = replace(FIRST, assignment_id="assignment-2", epoch=2)
    task = replace(GIVEN, epoch=2, assignment_id="assignment-2")
    with pytest.raises(StoreConflictError):
        await given.save(Changes((), (task,), (second,), new_assignment_ids=frozenset({"assignment-2"})))
    assert (await given.load(0.0)).tasks == {"task": GIVEN}


async def test_an_epoch_is_given_once(given):
    over = replace(FIRST, outcome=Outcome.LOST, ended_s=1e9 + 2)
    again = replace(FIRST, assignment_id="assignment-2")
    with pytest.raises(StoreConflictError):
        await given.save(Changes((), (), (over, again), new_assignment_ids=frozenset({"assignment-2"})))


async def test_an_epoch_is_not_taken_back(given):
    with pytest.raises(StoreConflictError):
        await given.save(Changes((), (replace(GIVEN, epoch=0),)))


async def test_an_assignment_ends_once(given):
    await given.save(Changes((), (), (replace(FIRST, outcome=Outcome.LOST, ended_s=1e9 + 2),)))
    with pytest.raises(StoreConflictError):
        await given.save(Changes((), (), (replace(FIRST, outcome=Outcome.COMPLETED, ended_s=1e9 + 3),)))


async def test_of_two_placements_that_give_a_task_away_one_fails(given):
    await given.save(Changes((), (replace(GIVEN, assignment_id=""),), (replace(FIRST, outcome=Outcome.LOST),)))

    async def give(name):
        row = replace(FIRST, assignment_id=name, epoch=2)
        task = replace(GIVEN, epoch=2, attempts=2, assignment_id=name)
        await given.save(Changes((), (task,), (row,), new_assignment_ids=frozenset({name})))
        return name

    answers = await asyncio.gather(give("assignment-2"), give("assignment-3"), return_exceptions=True)
    winners = [answer for answer in answers if isinstance(answer, str)]
    assert len(winners) == 1
    assert list((await given.load(0.0)).assignments) == winners
