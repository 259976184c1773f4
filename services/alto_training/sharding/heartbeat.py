"""Signs of life: one counter for each worker rank in a file that all map, read by whoever watches over them."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_COUNTER = struct.Struct("<q")


class Heartbeats:
    """The counters of `size` ranks in the file at `path`, which is made if it is not there."""

    def __init__(self, path: Path, size: int) -> None:
        with path.open("a+b") as file:
            file.truncate(size * _COUNTER.size)
            self._map = mmap.mmap(file.fileno(), size * _COUNTER.size)
        self._size = size

    def beat(self, rank: int) -> None:
        """Count one more sign of life of a rank."""
        offset = rank * _COUNTER.size
        _COUNTER.pack_into(self._map, offset, _COUNTER.unpack_from(self._map, offset)[0] + 1)

    def read(self) -> tuple[int, ...]:
        """Return the counters of all ranks."""
        return tuple(_COUNTER.unpack_from(self._map, rank * _COUNTER.size)[0] for rank in range(self._size))
