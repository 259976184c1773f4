"""Ending the tasks of a service that would go on for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

# As long as a reader takes to leave a database that is silent; a task that is told again tidies up no more.
AGAIN_S = 15.0

log = structlog.get_logger("alto.loops")


async def end_loops(loops: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until they have ended, however long that takes; an error that one ended with is logged.

    One that goes on is told again: grpc.aio can lose a cancellation that comes together with a call's status.
    """
    left = set(loops)
    while left:
        for loop in left:
            loop.cancel()
        ended, left = await asyncio.wait(left, timeout=AGAIN_S)
        for loop in ended:
            if not loop.cancelled() and (error := loop.exception()) is not None:
                log.error("a loop ended with an error", loop=_name(loop), exc_info=error)
        for loop in left:
            log.warning("a loop goes on though it was cancelled; telling it again", loop=_name(loop))


def _name(loop: asyncio.Task[None]) -> str:
    return str(getattr(loop.get_coro(), "__qualname__", loop.get_name()))
