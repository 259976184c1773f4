"""Ending the tasks of a service that would go on for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

# Longer than what a task still has to do: one that is told again while it tidies up leaves the rest undone.
AGAIN_S = 15.0

log = structlog.get_logger("alto.loops")


async def end_loops(loops: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until they have ended; what one died of before is logged.

    One that goes on is told again: grpc.aio can lose a cancellation that comes together with a call's status.
    """
    left = set(loops)
    while left:
        for loop in left:
            loop.cancel()
        ended, left = await asyncio.wait(left, timeout=AGAIN_S)
        for loop in ended:
            if not loop.cancelled() and (error := loop.exception()) is not None:
                name = getattr(loop.get_coro(), "__qualname__", loop.get_name())
                log.error("a loop had died", loop=name, exc_info=error)
