"""A process of its own for work that would hold up the server: importing torch, reading large files.

Calls are functions of importable modules with plain arguments and results. Domain failures are results, not exceptions:
an exception that was pickled loses what it carried.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import ParamSpec, TypeVar

import structlog
from alto_common.errors import unavailable

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger("alto.admission.worker")


class Worker:
    """One worker process, started by its first call, and again after it died."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ProcessPoolExecutor | None = None

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` in the worker and return its result. Raises UNAVAILABLE when the worker dies of it."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin)
        pool = self._pool
        try:
            return await asyncio.wrap_future(pool.submit(function, *args, **kwargs))
        except BrokenProcessPool as error:
            log.error("worker died", worker=self._name, function=function.__name__)
            if self._pool is pool:
                self._pool = None
            raise unavailable(f"the {self._name} worker died and is being started again") from error

    def close(self) -> None:
        """End the worker without waiting for what it is doing."""
        if self._pool is None:
            return
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        self._pool = None


def _begin() -> None:
    # Ctrl-C goes to the whole group: the server decides when its worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the server was killed: the pool's queues alone would keep an orphan waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
