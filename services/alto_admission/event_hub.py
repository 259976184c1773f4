"""Wakes watchers of a task when it has new events, at once for this process's writes and soon for another's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import structlog

log = structlog.get_logger("alto.admission.watch")


class _Topic:
    def __init__(self) -> None:
        self.watchers = 0
        self.last_sequence = 0
        self.news = asyncio.Event()


class Subscription:
    """One watcher's view of a task's news."""

    def __init__(self, hub: EventHub, topic: _Topic) -> None:
        self._hub = hub
        self._topic = topic

    async def wait_beyond(self, sequence: int, timeout_s: float) -> bool:
        """Wait until the task has an event behind `sequence`, or the hub closes; return False after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._topic.last_sequence <= sequence and not self._hub.closed:
                    await self._topic.news.wait()
        return self._topic.last_sequence > sequence or self._hub.closed


class EventHub:
    """Knows the last event of each task that is being watched.

    `look` reads the last sequences of tasks from the database; it is asked every `poll_s` seconds about the watched
    ones, because another process may have written.
    """

    def __init__(self, look: Callable[[Sequence[str]], Awaitable[dict[str, int]]], poll_s: float) -> None:
        self._look = look
        self._poll_s = poll_s
        self._topics: dict[str, _Topic] = {}
        self.closed = False

    def announce(self, task_id: str, sequence: int) -> None:
        """Tell that event `sequence` of a task is kept."""
        topic = self._topics.get(task_id)
        if topic is not None and sequence > topic.last_sequence:
            topic.last_sequence = sequence
            self._wake(topic)

    @contextmanager
    def watched(self, task_id: str) -> Iterator[Subscription]:
        """Follow a task: nothing that is announced inside the block is missed."""
        topic = self._topics.setdefault(task_id, _Topic())
        topic.watchers += 1
        try:
            yield Subscription(self, topic)
        finally:
            topic.watchers -= 1
            if topic.watchers == 0:
                del self._topics[task_id]

    async def poll(self) -> None:
        """Look for other processes' events, for ever."""
        while True:
            await asyncio.sleep(self._poll_s)
            if not self._topics:
                continue
            try:
                found = await self._look(list(self._topics))
            except Exception:
                log.exception("cannot look for new events")
                continue
            for task_id, sequence in found.items():
                self.announce(task_id, sequence)

    def close(self) -> None:
        """Wake every watcher for the last time."""
        self.closed = True
        for topic in self._topics.values():
            self._wake(topic)

    def _wake(self, topic: _Topic) -> None:
        topic.news.set()
        topic.news = asyncio.Event()
