"""Ending loops: those that hear it, one that loses its cancellation, one that has died of something else."""

import asyncio

import pytest
from alto_common import loops
from structlog.testing import capture_logs


@pytest.fixture(autouse=True)
def told_again_soon(monkeypatch):
    monkeypatch.setattr(loops, "AGAIN_S", 0.1)


async def forever():
    await asyncio.sleep(3600)


async def hears_it_the_third_time():
    for _ in range(2):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue
    await asyncio.sleep(3600)


async def dies():
    raise RuntimeError("of something else")


async def test_all_have_ended_and_what_one_died_of_is_told():
    tasks = [asyncio.create_task(loop()) for loop in (dies, hears_it_the_third_time, forever)]
    await asyncio.sleep(0)
    with capture_logs() as logs:
        async with asyncio.timeout(10):
            await loops.end_loops(tasks)
    assert [task.cancelled() for task in tasks] == [False, True, True]
    told_again = ("a loop goes on though it was cancelled; telling it again", hears_it_the_third_time.__name__, "None")
    assert [(entry["event"], entry["loop"], str(entry.get("exc_info"))) for entry in logs] == [
        ("a loop ended with an error", "dies", "of something else"),
        told_again,
        told_again,
    ]


async def test_there_may_be_none():
    await loops.end_loops([])
