"""What worker ranks tell each other between passes: small plain JSON, over gloo, beside whatever the backbone uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from alto_training.executor.control import Command
from alto_training.sharding.dealing import deal
from alto_training.sharding.plain_json import decode_named, encode_named

_INLINE_BYTES = 4096
_LENGTH_BYTES = 8


class WorkerRanks:
    """`Ranks` over a gloo process group. `arrived` is told which moment it is before and after each exchange.

    `moves` counts the times that a trial was dealt to another rank.

    Floats go through JSON, which gives back the same bits. What passes between ranks here are losses, norms, commands
    and file names; never a weight or a gradient.
    """

    def __init__(self, group: dist.ProcessGroup, arrived: Callable[[int], None] = lambda moment: None) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.moves = 0
        self._group = group
        self._arrived = arrived
        self._moment = 0

    def first(self, commands: list[Command], due: bool) -> tuple[list[Command], bool]:
        """See `Ranks.first`."""
        said = self._exchange([[encode_named(command) for command in commands], due] if self.rank == 0 else None)[0]
        return [decode_named(Command, command) for command in said[0]], said[1]

    def united(self, mine: dict[str, Any]) -> dict[str, Any]:
        """See `Ranks.united`."""
        return {key: value for theirs in self._exchange(mine) for key, value in theirs.items()}

    def deal(self, loads: Sequence[float], owners: Sequence[int | None]) -> list[int]:
        """See `Ranks.deal`."""
        dealt = deal(loads, owners, self.size)
        self.moves += sum(before not in (None, after) for before, after in zip(owners, dealt, strict=True))
        return dealt

    def _exchange(self, mine: Any) -> list[Any]:
        """Return what each rank gives, by rank. Most fits into one small message; else a second one takes it all."""
        self._arrive()
        said = json.dumps(mine).encode()
        head = len(said).to_bytes(_LENGTH_BYTES, "little") + said[: _INLINE_BYTES - _LENGTH_BYTES]
        heads = self._gather(head, _INLINE_BYTES)
        lengths = [int.from_bytes(one[:_LENGTH_BYTES], "little") for one in heads]
        longest = max(lengths)
        if longest <= _INLINE_BYTES - _LENGTH_BYTES:
            whole = [one[_LENGTH_BYTES:] for one in heads]
        else:
            whole = self._gather(said, longest)
        self._arrive()
        return [json.loads(one[:length]) for one, length in zip(whole, lengths, strict=True)]

    def _arrive(self) -> None:
        self._moment += 1
        self._arrived(self._moment)

    def _gather(self, said: bytes, size: int) -> list[bytes]:
        padded = torch.frombuffer(bytearray(said.ljust(size, b"\0")), dtype=torch.uint8)
        all_said = [torch.empty(size, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(all_said, padded, group=self._group)
        return [one.numpy().tobytes() for one in all_said]
