"""Shares of parameters that ranks of one host read from each other's GPU memory: frozen weights need no collective.

A unit's parameters lie in one flat buffer, cut into equal shares. A gather is a copy of the others' shares, which never
change, by the GPU's copy engines over NVLink: no multiprocessor is taken from the computation beside it, and no rank
waits for another to come to a gather. With three ranks or more, two could read from one GPU while nobody reads from
another: copies take turns at each. CUDA alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from alto_kernels.copies import Copies, CopyLanes
from torch import nn

from alto_training.sharding.units import ShardedUnit, tensor_bytes

_ALIGNMENT = 64  # elements: what kernels and copies like
_LANES = 2  # streams of copies: for the shares of the others, and for this rank's own


@dataclass(frozen=True)
class FlatLayout:
    """Where each parameter begins in a flat buffer, and the elements of a rank's share, in elements."""

    offsets: tuple[int, ...]
    share: int


def flat_layout(sizes: Sequence[int], ranks: int) -> FlatLayout:
    """Lay parameters of these sizes one behind the other, and cut the whole into equal shares.

    >>> flat_layout([100, 30], ranks=2)
    FlatLayout(offsets=(0, 128), share=128)
    """
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    share = -(-end // ranks)
    return FlatLayout(tuple(offsets), -(-share // _ALIGNMENT) * _ALIGNMENT)


@dataclass(frozen=True)
class GatherBuffer:
    """Room for all shares of a unit: `whole`, and each rank's part of it; `target` is its number with the lanes."""

    whole: torch.Tensor
    parts: Sequence[torch.Tensor]
    target: int | None = None


class GatherBuffers:
    """Buffers that units take turns in, filled by copies beside the computation. On a CPU they are plain copies.

    A rank's own share goes by a lane of its own: over NVLink the others' shares are what takes long.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lanes = CopyLanes(device, _LANES) if device.type == "cuda" else None
        self._idle: dict[tuple[int, torch.dtype], list[GatherBuffer]] = {}

    def gather(self, shares: Sequence[torch.Tensor], copies: Copies) -> GatherBuffer:
        """Launch the copies of all shares, which `plan_copies` gave; return the buffer that they go to.

        Whoever used the buffer last has been launched on the current stream.
        """
        size, ranks = shares[0].numel(), len(shares)
        waiting = self._idle.setdefault((size * ranks, shares[0].dtype), [])
        buffer = waiting.pop() if waiting else self._make_buffer(shares)
        if self._lanes is None or buffer.target is None:
            for part, share in zip(buffer.parts, shares, strict=True):
                part.copy_(share)
        else:
            self._lanes.gather(buffer.target, copies, size * shares[0].element_size())
        return buffer

    def wait(self, buffer: GatherBuffer) -> None:
        """Have what is launched from here on wait for the copies into the buffer."""
        if self._lanes is not None and buffer.target is not None:
            self._lanes.wait(buffer.target)

    def give_back(self, buffer: GatherBuffer) -> None:
        """Let another unit have the buffer."""
        self._idle[buffer.whole.numel(), buffer.whole.dtype].append(buffer)

    def _make_buffer(self, shares: Sequence[torch.Tensor]) -> GatherBuffer:
        size = shares[0].numel()
        whole = torch.empty(size * len(shares), dtype=shares[0].dtype, device=self._device)
        parts = torch.split(whole, size)
        return GatherBuffer(whole, parts, None if self._lanes is None else self._lanes.add_target(parts))


def plan_copies(shares: Sequence[torch.Tensor], mine: int, busy: Sequence[torch.Tensor]) -> Copies:
    """Return what is copied by which lane: the shares of the others, and `mine` beside them.

    Ranks read from each other in pairs, in each turn from another: of four 0 and 1, 2 and 3; then 0 and 2, 1 and 3.
    `busy` says of each rank whether somebody reads from there; empty where nobody else does.
    """
    ranks = len(shares)
    pairs = range(1, 1 << (ranks - 1).bit_length())
    others = [mine ^ pair for pair in pairs if mine ^ pair < ranks]
    copies = [(shares[rank].data_ptr(), rank, 0, busy[rank].data_ptr() if busy else 0) for rank in others]
    return [*copies, (shares[mine].data_ptr(), mine, 1, 0)]


class PeerEngine:
    """A `ShardingEngine` over the ranks of `group`, which are on one host, each with a GPU of its own."""

    name = "peer"
    in_lock_step = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.ranks = dist.get_world_size(group)
        self._group = group
        self._device = device
        self._buffers = GatherBuffers(device)
        self._busy = self._share_busy() if self.ranks > 2 else []

    def shard(self, name: str, modules: nn.Sequential) -> ShardedUnit:
        """See `ShardingEngine.shard`."""
        parameters = list(modules.parameters())
        rank = dist.get_rank(self._group)
        layout = flat_layout([parameter.numel() for parameter in parameters], self.ranks)
        whole = flatten(parameters, layout, self.ranks)
        shares = self._share(whole[rank * layout.share : (rank + 1) * layout.share])
        return PeerUnit(name, parameters, layout, shares, rank, self._buffers, self._busy)

    def _share_busy(self) -> list[torch.Tensor]:
        """Return an int32 in each GPU's memory: one while somebody reads from there."""
        return self._share(torch.zeros(_ALIGNMENT, dtype=torch.int32, device=self._device))

    def _share(self, content: torch.Tensor) -> list[torch.Tensor]:
        """Return what each rank brought, all in reach: this rank's a copy of `content`, as long as any other's."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        rank, length, dtype = dist.get_rank(self._group), content.numel(), content.dtype
        mine = symmetric_memory.empty(length, dtype=dtype, device=self._device)
        reach: Any = symmetric_memory.rendezvous(mine, self._group.group_name)
        mine.copy_(content)
        torch.cuda.synchronize(self._device)
        dist.barrier(self._group)  # nobody reads before all have written
        return [mine if peer == rank else reach.get_buffer(peer, (length,), dtype) for peer in range(self.ranks)]


def flatten(parameters: Sequence[nn.Parameter], layout: FlatLayout, ranks: int) -> torch.Tensor:
    """Return the parameters in one flat buffer."""
    first = parameters[0]
    flat = torch.zeros(layout.share * ranks, dtype=first.dtype, device=first.device)
    for parameter, offset in zip(parameters, layout.offsets, strict=True):
        flat[offset : offset + parameter.numel()].copy_(parameter.detach().flatten())
    return flat


class PeerUnit:
    """A `ShardedUnit` over `shares`, one of each rank, all in this process's reach, with what says who is `busy`."""

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        layout: FlatLayout,
        shares: Sequence[torch.Tensor],
        rank: int,
        buffers: GatherBuffers,
        busy: Sequence[torch.Tensor] = (),
    ) -> None:
        self.name = name
        self.gathered_bytes = tensor_bytes(list(shares))
        self.shard_bytes = tensor_bytes([shares[rank]])
        self._parameters = parameters
        self._shapes = [parameter.shape for parameter in parameters]
        self._layout = layout
        self._shares = shares
        self._busy = busy  # copies name memory by its address: here it is kept
        self._copies = plan_copies(shares, rank, busy)
        self._buffers = buffers
        self._nothing = shares[rank].new_empty(0)
        # By the buffer's address: there are few, and making views anew takes the host longer than all else here.
        self._views: dict[int, list[torch.Tensor]] = {}
        self._buffer: GatherBuffer | None = None
        self.release()

    def start(self) -> None:
        """See `ShardedUnit.start`."""
        self._buffer = self._buffers.gather(self._shares, self._copies)

    def finish(self) -> None:
        """See `ShardedUnit.finish`."""
        assert self._buffer is not None
        self._buffers.wait(self._buffer)
        whole = self._buffer.whole
        if whole.data_ptr() not in self._views:
            self._views[whole.data_ptr()] = [
                whole[offset : offset + math.prod(shape)].view(shape)
                for shape, offset in zip(self._shapes, self._layout.offsets, strict=True)
            ]
        for parameter, view in zip(self._parameters, self._views[whole.data_ptr()], strict=True):
            parameter.data = view

    def release(self) -> None:
        """See `ShardedUnit.release`."""
        for parameter in self._parameters:
            parameter.data = self._nothing
        if self._buffer is not None:
            self._buffers.give_back(self._buffer)
        self._buffer = None
