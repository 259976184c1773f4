"""Memory of GPUs that the ranks of a host have in common: each gives the others a file descriptor of what it brings.

Descriptors pass between processes by a Unix socket alone. Each rank listens in a folder that its user alone may enter.
A rank that is gone is a `ConnectionError` of all others, which end by it, so that it is seen who went first.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

_RANK_BYTES = 4


class DescriptorExchange:
    """A socket between each two ranks of `group`, all on one host. All ranks make it, and `exchange`, together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        folder = Path(tempfile.mkdtemp(prefix="alto-ranks-"))
        try:
            self._sockets = self._connect(folder, group)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def exchange(self, descriptor: int) -> list[int]:
        """Return a descriptor of what each other rank brought, by rank, -1 for this one; who asks closes them.

        Returns when all have brought theirs. Raises `ConnectionError` where a rank is gone.
        """
        found = [-1] * self._ranks
        try:
            for other in self._sockets.values():
                socket.send_fds(other, [b"."], [descriptor])
            for rank, other in self._sockets.items():
                told, received, _, _ = socket.recv_fds(other, 1, 1)
                if not told:
                    raise ConnectionError(f"rank {rank} is gone")
                if not received:
                    raise OSError(f"no descriptor came from rank {rank}: as many as this process may have are open")
                found[rank] = received[0]
        except OSError:
            close_all(found)
            raise
        return found

    def _connect(self, folder: Path, group: dist.ProcessGroup) -> dict[int, socket.socket]:
        """Return sockets by the rank that they lead to: this rank calls those before it, and those after call it."""
        found: dict[int, socket.socket] = {}
        with socket.socket(socket.AF_UNIX) as listening:
            with _short_address(folder) as address:
                listening.bind(address)
            listening.listen(self._ranks)
            folders: list[str] = [""] * self._ranks
            dist.all_gather_object(folders, str(folder), group)
            for rank in range(self._rank):
                found[rank] = socket.socket(socket.AF_UNIX)
                with _short_address(Path(folders[rank])) as address:
                    found[rank].connect(address)
                found[rank].sendall(self._rank.to_bytes(_RANK_BYTES))
            for _ in range(self._rank + 1, self._ranks):
                other, _ = listening.accept()
                told = other.recv(_RANK_BYTES, socket.MSG_WAITALL)
                if len(told) < _RANK_BYTES:
                    raise ConnectionError("a rank is gone")
                found[int.from_bytes(told)] = other
        return dict(sorted(found.items()))


def close_all(descriptors: list[int]) -> None:
    """Close what `exchange` returned."""
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def _short_address(folder: Path) -> Iterator[str]:
    """Name the socket in a folder by a path that is short wherever the folder is: an address has 107 characters."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/socket"
    finally:
        os.close(descriptor)
