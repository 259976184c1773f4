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


class CopyLane:
    """Copies beside the computation, into buffers that units take turns in. On a CPU they are plain copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._idle: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def gather(self, shares: Sequence[torch.Tensor], first: int) -> tuple[torch.Tensor, Any]:
        """Launch the copies of all shares, beginning with `first`; return the buffer, and the event of their end."""
        share = shares[0]
        waiting = self._idle.setdefault((share.numel() * len(shares), share.dtype), [])
        buffer = (
            waiting.pop()
            if waiting
            else torch.empty(share.numel() * len(shares), dtype=share.dtype, device=self._device)
        )
        order = [(first + turn) % len(shares) for turn in range(len(shares))]
        if self._stream is None:
            self._copy(buffer, shares, order)
            return buffer, None
        # Whoever used the buffer last has been launched on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy(buffer, shares, order)
            return buffer, self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Have what is launched from here on wait for a gather."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Let another unit have the buffer."""
        self._idle[buffer.numel(), buffer.dtype].append(buffer)

    def _copy(self, buffer: torch.Tensor, shares: Sequence[torch.Tensor], order: Sequence[int]) -> None:
        size = shares[0].numel()
        for rank in order:
            buffer[rank * size : (rank + 1) * size].copy_(shares[rank], non_blocking=True)


class PeerEngine:
    """A `ShardingEngine` over the ranks of `group`, which are on one host, each with a GPU of its own."""

    name = "peer"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._lane = CopyLane(device)

    def shard(self, name: str, modules: nn.Sequential) -> ShardedUnit:
        """See `ShardingEngine.shard`."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        parameters = list(modules.parameters())
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        layout = flat_layout([parameter.numel() for parameter in parameters], ranks)
        dtype = parameters[0].dtype
        mine = symmetric_memory.empty(layout.share, dtype=dtype, device=self._device)
        reach: Any = symmetric_memory.rendezvous(mine, self._group.group_name)
        shares = [mine if peer == rank else reach.get_buffer(peer, (layout.share,), dtype) for peer in range(ranks)]
        mine.copy_(flatten(parameters, layout, ranks)[rank * layout.share : (rank + 1) * layout.share])
        torch.cuda.synchronize(self._device)
        dist.barrier(self._group)  # nobody reads before all have written
        return PeerUnit(name, parameters, layout, shares, rank, self._lane)


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
        lane: CopyLane,
    ) -> None:
        self.name = name
        self.gathered_bytes = tensor_bytes(list(shares))
        self.shard_bytes = tensor_bytes([shares[rank]])
        self._parameters = parameters
        self._shapes = [parameter.shape for parameter in parameters]
        self._layout = layout
        self._shares = shares
        self._rank = rank
        self._lane = lane
        self._nothing = shares[rank].new_empty(0)
        # By the buffer's address: the lane has few, and making views anew takes the host longer than all else here.
        self._views: dict[int, list[torch.Tensor]] = {}
        self._buffer = self._nothing
        self._event: Any = None
        self.release()

    def start(self) -> None:
        """See `ShardedUnit.start`; only, nobody else need do the same."""
        self._buffer, self._event = self._lane.gather(self._shares, self._rank)

    def finish(self) -> None:
        """See `ShardedUnit.finish`."""
        self._lane.wait(self._event)
        buffer = self._buffer
        if buffer.data_ptr() not in self._views:
            self._views[buffer.data_ptr()] = [
                buffer[offset : offset + math.prod(shape)].view(shape)
                for shape, offset in zip(self._shapes, self._layout.offsets, strict=True)
            ]
        for parameter, view in zip(self._parameters, self._views[buffer.data_ptr()], strict=True):
            parameter.data = view

    def release(self) -> None:
        """See `ShardedUnit.release`."""
        for parameter in self._parameters:
            parameter.data = self._nothing
        if self._buffer.numel():
            self._lane.give_back(self._buffer)
        self._buffer = self._nothing
