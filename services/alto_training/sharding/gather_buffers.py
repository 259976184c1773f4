"""Where the shares of a unit come together, and the copies that bring them there.

On a GPU what this rank keeps of a unit is not copied: its memory is mapped between that of a room, which the others'
shares are copied to, so that the unit has its weights side by side. Rooms are few, and units take turns in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from alto_kernels.copies import Copies, CopyLane
from alto_kernels.mapped_memory import PhysicalMemory, make_memory, mapped


@dataclass(frozen=True, eq=False)
class Shares:
    """A unit's shares, one of each rank and all in this process's reach; number `mine` is this rank's own.

    On a GPU `memory` is what its own lies in. `busy` says of each rank whether somebody reads from there; empty where
    nobody else does.
    """

    tensors: Sequence[torch.Tensor]
    mine: int
    memory: PhysicalMemory | None = None
    busy: Sequence[torch.Tensor] = ()

    @property
    def share_bytes(self) -> int:
        """The bytes of a share: all are alike."""
        return self.tensors[self.mine].nbytes

    @cached_property
    def copies(self) -> Copies:
        """What is copied of the others' shares.

        Ranks read from each other in pairs, in each turn from another: of four 0 and 1, 2 and 3; then 0 and 2, 1 and 3.
        """
        ranks = len(self.tensors)
        pairs = range(1, 1 << (ranks - 1).bit_length())
        others = [self.mine ^ pair for pair in pairs if self.mine ^ pair < ranks]
        return [
            (self.tensors[rank].data_ptr(), rank, self.busy[rank].data_ptr() if self.busy else 0) for rank in others
        ]


@dataclass(frozen=True, eq=False)
class GatherBuffer:
    """All shares of a unit, side by side: `whole`, and each rank's part of it; `target` is its number with the lane."""

    whole: torch.Tensor
    parts: Sequence[torch.Tensor]
    room: Room | None = None
    target: int = 0


class GatherBuffers(Protocol):
    """Buffers that units take turns in. `size_bytes` of them are not in torch's count."""

    size_bytes: int

    def gather(self, shares: Shares) -> GatherBuffer:
        """Launch the copies of a unit's shares; return the buffer that they come to.

        Whoever used its memory last has been launched on the current stream.
        """
        ...

    def wait(self, buffer: GatherBuffer) -> None:
        """Have what is launched from here on wait for the copies into the buffer."""
        ...

    def give_back(self, buffer: GatherBuffer) -> None:
        """Let another unit have the memory."""
        ...


class PlainBuffers:
    """`GatherBuffers` on a CPU, where one process has all shares: plain copies."""

    size_bytes = 0

    def __init__(self) -> None:
        self._idle: dict[tuple[int, torch.dtype], list[GatherBuffer]] = {}

    def gather(self, shares: Shares) -> GatherBuffer:
        """See `GatherBuffers.gather`."""
        first = shares.tensors[0]
        waiting = self._idle.setdefault((first.numel() * len(shares.tensors), first.dtype), [])
        if not waiting:
            whole = first.new_empty(first.numel() * len(shares.tensors))
            waiting.append(GatherBuffer(whole, torch.split(whole, first.numel())))
        buffer = waiting.pop()
        for part, share in zip(buffer.parts, shares.tensors, strict=True):
            part.copy_(share)
        return buffer

    def wait(self, buffer: GatherBuffer) -> None:
        """See `GatherBuffers.wait`: they are there."""

    def give_back(self, buffer: GatherBuffer) -> None:
        """See `GatherBuffers.give_back`."""
        self._idle[buffer.whole.numel(), buffer.whole.dtype].append(buffer)


@dataclass(eq=False)
class Room:
    """Memory for the shares of the others, and how it was laid out so far, by the unit's shares."""

    memories: Sequence[PhysicalMemory]
    buffers: dict[Shares, GatherBuffer] = field(default_factory=dict)


class MappedBuffers:
    """`GatherBuffers` on a GPU: copies beside the computation, by one lane."""

    def __init__(self, device: torch.device) -> None:
        self.size_bytes = 0
        self._device = device
        self._lane = CopyLane(device)
        self._idle: dict[tuple[int, int], list[Room]] = {}

    def gather(self, shares: Shares) -> GatherBuffer:
        """See `GatherBuffers.gather`. Raises `MemoryError`."""
        waiting = self._idle.setdefault((shares.share_bytes, len(shares.tensors)), [])
        if not waiting:
            waiting.append(self._make_room(shares))
        room = waiting[-1]
        if shares not in room.buffers:
            room.buffers[shares] = self._lay_out(room, shares)
        buffer = room.buffers[shares]
        self._lane.gather(buffer.target, shares.copies, shares.share_bytes)
        waiting.pop()
        return buffer

    def wait(self, buffer: GatherBuffer) -> None:
        """See `GatherBuffers.wait`."""
        self._lane.wait(buffer.target)

    def give_back(self, buffer: GatherBuffer) -> None:
        """See `GatherBuffers.give_back`."""
        assert buffer.room is not None
        self._idle[buffer.parts[0].nbytes, len(buffer.parts)].append(buffer.room)

    def _make_room(self, shares: Shares) -> Room:
        others = range(len(shares.tensors) - 1)
        room = Room([make_memory(self._device, shares.share_bytes) for _ in others])
        self.size_bytes += sum(memory.size_bytes for memory in room.memories)
        return room

    def _lay_out(self, room: Room, shares: Shares) -> GatherBuffer:
        assert shares.memory is not None
        memories = list(room.memories)
        memories.insert(shares.mine, shares.memory)
        own = shares.tensors[shares.mine]
        whole = mapped(self._device, memories, own.dtype)
        parts = torch.split(whole, own.numel())
        return GatherBuffer(whole, parts, room, self._lane.add_target([part.data_ptr() for part in parts]))
