"""Memory of GPUs that the ranks of a host have in common: each gives the others a file descriptor of what it brings.

Descriptors pass between processes by a Unix socket alone. Each rank listens in a folder that its user alone may enter.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import torch.distributed as dist

from alto_training.sharding.errors import ShardedLoadError


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

        Returns when all have brought theirs. Raises `ShardedLoadError` where a rank is gone.
        """
        found = [-1] * self._ranks
        try:
            for other in self._sockets.values():
                socket.send_fds(other, [b"."], [descriptor])
            for rank, other in self._sockets.items():
                _, received, _, _ = socket.recv_fds(other, 1, 1)
                if not received:
                    raise ConnectionError(f"rank {rank} is gone")
                found[rank] = received[0]
        except OSError as error:
            for one in found:
                if one >= 0:
                    os.close(one)
            raise ShardedLoadError(f"no memory came from another rank: {error}", "see why that rank ended") from error
        return found

    def _connect(self, folder: Path, group: dist.ProcessGroup) -> dict[int, socket.socket]:
        """Return sockets by the rank that they lead to: this rank calls those before it, and those after call it."""
        found: dict[int, socket.socket] = {}
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / "socket"))
            listening.listen(self._ranks)
            folders: list[str] = [""] * self._ranks
            dist.all_gather_object(folders, str(folder), group)
            for rank in range(self._rank):
                found[rank] = socket.socket(socket.AF_UNIX)
                found[rank].connect(str(Path(folders[rank]) / "socket"))
                found[rank].sendall(self._rank.to_bytes(4))
            for _ in range(self._rank + 1, self._ranks):
                other, _ = listening.accept()
                found[int.from_bytes(other.recv(4, socket.MSG_WAITALL))] = other
        return dict(sorted(found.items()))
