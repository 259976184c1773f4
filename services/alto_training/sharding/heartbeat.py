"""Signs of life: one counter for each worker rank in a file that all map, read by whoever watches over them."""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COUNTER = struct.Struct("<q")
_INTERVAL_S = 5.0
_MOST_BETWEEN = 1 << 24  # signs of life between two moments


class Heartbeats:
    """The counters of `size` ranks in the file at `path`, which is made if it is not there."""

    def __init__(self, path: Path, size: int) -> None:
        with path.open("a+b") as file:
            file.truncate(size * _COUNTER.size)
            self._map = mmap.mmap(file.fileno(), size * _COUNTER.size)
        self._size = size

    def beat(self, rank: int) -> None:
        """Count one more sign of life of a rank."""
        self._put(rank, self.read()[rank] + 1)

    def arrive(self, rank: int, moment: int) -> None:
        """Count a rank as having come to `moment`, which all ranks come to in turn: more than any signs before it.

        Between two moments ranks may have more work or less.
        """
        self._put(rank, moment * _MOST_BETWEEN)

    @contextmanager
    def kept_up(self, rank: int, interval_s: float = _INTERVAL_S) -> Iterator[None]:
        """Give signs of life through work that is no step, such as tokenising a large dataset.

        They do not count in the end: whoever is behind all others in steps is still told by the counters.
        """
        before = self.read()[rank]
        over = threading.Event()

        def beat_on() -> None:
            while not over.wait(interval_s):
                self.beat(rank)

        thread = threading.Thread(target=beat_on, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._put(rank, before)

    def read(self) -> tuple[int, ...]:
        """Return the counters of all ranks."""
        return tuple(_COUNTER.unpack_from(self._map, rank * _COUNTER.size)[0] for rank in range(self._size))

    def _put(self, rank: int, count: int) -> None:
        _COUNTER.pack_into(self._map, rank * _COUNTER.size, count)
