"""Shares of parameters that ranks of one host read from each other's GPU memory: frozen weights need no collective.

A unit's parameters lie in one flat buffer, cut into equal shares. A gather is a copy of the others' shares, which never
change, by the GPU's copy engines over NVLink: no multiprocessor is taken from the computation beside it, and no rank
waits for another. CUDA alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from alto_training.sharding.units import ShardedUnit, tensor_bytes

_ALIGNMENT = 64  # elements: what kernels and copies like
_LANES = 2  # streams of copies, two at least: one for this rank's own share, the rest for those of the others


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
    """Room for all shares of a unit: `whole`, and each rank's part of it."""

    whole: torch.Tensor
    parts: Sequence[torch.Tensor]


class CopyLanes:
    """Copies beside the computation, into buffers that units take turns in. On a CPU they are plain copies.

    A rank's own share goes by a lane of its own: over NVLink the others' shares are what takes long.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: list[Any] = []
        if device.type == "cuda":
            self._streams = [
                torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
                for _ in range(_LANES)
            ]
        self._idle: dict[tuple[int, torch.dtype], list[GatherBuffer]] = {}

    def gather(self, shares: Sequence[torch.Tensor], mine: int) -> tuple[GatherBuffer, list[Any]]:
        """Launch the copies of all shares, of which `mine` is this rank's; return the buffer, and the lanes' ends."""
        size, ranks = shares[0].numel(), len(shares)
        waiting = self._idle.setdefault((size * ranks, shares[0].dtype), [])
        buffer = waiting.pop() if waiting else self._make_buffer(shares)
        others = [(mine + turn) % ranks for turn in range(1, ranks)]
        if not self._streams:
            for rank in (*others, mine):
                buffer.parts[rank].copy_(shares[rank])
            return buffer, []
        # Whoever used the buffer last has been launched on the current stream.
        idle = torch.cuda.current_stream(self._device).record_event()
        remote = len(self._streams) - 1
        ends = []
        for lane, stream in enumerate(self._streams):
            stream.wait_event(idle)
            with torch.cuda.stream(stream):
                for rank in others[lane::remote] if lane < remote else (mine,):
                    buffer.parts[rank].copy_(shares[rank], non_blocking=True)
                ends.append(stream.record_event())
        return buffer, ends

    def wait(self, ends: Sequence[Any]) -> None:
        """Have what is launched from here on wait for a gather."""
        for end in ends:
            torch.cuda.current_stream(self._device).wait_event(end)

    def give_back(self, buffer: GatherBuffer) -> None:
        """Let another unit have the buffer."""
        self._idle[buffer.whole.numel(), buffer.whole.dtype].append(buffer)

    def _make_buffer(self, shares: Sequence[torch.Tensor]) -> GatherBuffer:
        size = shares[0].numel()
        whole = torch.empty(size * len(shares), dtype=shares[0].dtype, device=self._device)
        return GatherBuffer(whole, torch.split(whole, size))


class PeerEngine:
    """A `ShardingEngine` over the ranks of `group`, which are on one host, each with a GPU of its own."""

    name = "peer"
    in_lock_step = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.ranks = dist.get_world_size(group)
        self._group = group
        self._device = device
        self._lanes = CopyLanes(device)

    def shard(self, name: str, modules: nn.Sequential) -> ShardedUnit:
        """See `ShardingEngine.shard`."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        parameters = list(modules.parameters())
        rank, ranks = dist.get_rank(self._group), self.ranks
        layout = flat_layout([parameter.numel() for parameter in parameters], ranks)
        dtype = parameters[0].dtype
        mine = symmetric_memory.empty(layout.share, dtype=dtype, device=self._device)
        reach: Any = symmetric_memory.rendezvous(mine, self._group.group_name)
        shares = [mine if peer == rank else reach.get_buffer(peer, (layout.share,), dtype) for peer in range(ranks)]
        mine.copy_(flatten(parameters, layout, ranks)[rank * layout.share : (rank + 1) * layout.share])
        torch.cuda.synchronize(self._device)
        dist.barrier(self._group)  # nobody reads before all have written
        return PeerUnit(name, parameters, layout, shares, rank, self._lanes)


def flatten(parameters: Sequence[nn.Parameter], layout: FlatLayout, ranks: int) -> torch.Tensor:
    """Return the parameters in one flat buffer."""
    first = parameters[0]
    flat = torch.zeros(layout.share * ranks, dtype=first.dtype, device=first.device)
    for parameter, offset in zip(parameters, layout.offsets, strict=True):
        flat[offset : offset + parameter.numel()].copy_(parameter.detach().flatten())
    return flat


class PeerUnit:
    """A `ShardedUnit` over `shares`, one of each rank, all within this process's reach."""

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        layout: FlatLayout,
        shares: Sequence[torch.Tensor],
        rank: int,
        lanes: CopyLanes,
    ) -> None:
        self.name = name
        self.gathered_bytes = tensor_bytes(list(shares))
        self.shard_bytes = tensor_bytes([shares[rank]])
        self._parameters = parameters
        self._shapes = [parameter.shape for parameter in parameters]
        self._layout = layout
        self._shares = shares
        self._rank = rank
        self._lanes = lanes
        self._nothing = shares[rank].new_empty(0)
        # By the buffer's address: the lanes have few, and making views anew takes the host longer than all else here.
        self._views: dict[int, list[torch.Tensor]] = {}
        self._buffer: GatherBuffer | None = None
        self._ends: list[Any] = []
        self.release()

    def start(self) -> None:
        """See `ShardedUnit.start`."""
        self._buffer, self._ends = self._lanes.gather(self._shares, self._rank)

    def finish(self) -> None:
        """See `ShardedUnit.finish`."""
        assert self._buffer is not None
        self._lanes.wait(self._ends)
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
            self._lanes.give_back(self._buffer)
        self._buffer = None
