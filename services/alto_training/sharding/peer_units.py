"""Shares of parameters that ranks of one host read from each other's GPU memory: frozen weights need no collective.

A unit's parameters lie in one flat buffer, cut into equal shares. A gather is a copy of the others' shares, which never
change, by the GPU's copy engines over NVLink: no multiprocessor is taken from the computation beside it, and no rank
waits for another to come to a gather. With three ranks or more, two could read from one GPU while nobody reads from
another: copies take turns at each. Of an embedding the rows of a pass are read where they lie. CUDA alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from alto_kernels.mapped_memory import PhysicalMemory, granularity, make_memory, mapped, memory_of
from torch import nn

from alto_training.sharding.gather_buffers import GatherBuffer, GatherBuffers, MappedBuffers, Shares
from alto_training.sharding.host_memory import DescriptorExchange, close_all
from alto_training.sharding.units import ShardedRows, ShardedUnit, tensor_bytes

_ALIGNMENT = 64  # elements: what kernels and copies like


@dataclass(frozen=True)
class FlatLayout:
    """Where each parameter begins in a flat buffer, and the elements of a rank's share, in elements."""

    offsets: tuple[int, ...]
    share: int


def flat_layout(sizes: Sequence[int], ranks: int, multiple: int = _ALIGNMENT) -> FlatLayout:
    """Lay parameters of these sizes one behind the other, and cut the whole into equal shares, of a multiple each.

    >>> flat_layout([100, 30], ranks=2)
    FlatLayout(offsets=(0, 128), share=128)
    """
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    share = -(-end // ranks)
    return FlatLayout(tuple(offsets), -(-share // multiple) * multiple)


class PeerEngine:
    """A `ShardingEngine` over the ranks of `group`, which are on one host, each with a GPU of its own."""

    name = "peer"
    in_lock_step = False
    in_place = True

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.ranks = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        self._device = device
        self._exchange = DescriptorExchange(group)
        self._granularity = granularity(device)
        self._buffers = MappedBuffers(device)
        self._kept_bytes = 0
        self._busy = self._share_busy() if self.ranks > 2 else []

    @property
    def uncounted_bytes(self) -> int:
        """See `ShardingEngine`: all shares and buffers."""
        return self._kept_bytes + self._buffers.size_bytes

    def shard(self, name: str, modules: nn.Sequential) -> ShardedUnit:
        """See `ShardingEngine.shard`."""
        parameters = list(modules.parameters())
        multiple = self._granularity // parameters[0].element_size()
        layout = flat_layout([parameter.numel() for parameter in parameters], self.ranks, multiple)
        whole = flatten(parameters, layout, self.ranks)
        memory, tensors = self._bring(whole[self._rank * layout.share : (self._rank + 1) * layout.share])
        return PeerUnit(name, parameters, layout, Shares(tensors, self._rank, memory, self._busy), self._buffers)

    def shard_rows(self, embedding: nn.Embedding) -> ShardedRows | None:
        """See `ShardingEngine.shard_rows`."""
        weight_VH = embedding.weight.detach()
        rows, width = -(-weight_VH.shape[0] // self.ranks), weight_VH.shape[1]
        mine_RH = weight_VH.new_zeros(rows, width)
        part_RH = weight_VH[self._rank * rows : (self._rank + 1) * rows]
        mine_RH[: part_RH.shape[0]].copy_(part_RH)
        _, tensors = self._bring(mine_RH.flatten())
        return PeerRows([tensor[: rows * width].view(rows, width) for tensor in tensors], self._rank)

    def _share_busy(self) -> list[torch.Tensor]:
        """Return an int32 in each GPU's memory: one while somebody reads from there."""
        return self._bring(torch.zeros(1, dtype=torch.int32, device=self._device))[1]

    def _bring(self, content: torch.Tensor) -> tuple[PhysicalMemory, list[torch.Tensor]]:
        """Return this rank's memory with a copy of `content`, and what each rank brought, all in reach and as long."""
        size_bytes = -(-content.nbytes // self._granularity) * self._granularity
        memory = make_memory(self._device, size_bytes)
        mine = mapped(self._device, [memory], content.dtype)
        mine[: content.numel()].copy_(content)
        torch.cuda.synchronize(self._device)  # nobody reads before all have written: then they share
        self._kept_bytes += size_bytes
        shared = memory.share()
        try:
            descriptors = self._exchange.exchange(shared)
        finally:
            os.close(shared)
        try:
            return memory, [
                mine if rank == self._rank else self._mapped_of(descriptor, size_bytes, content.dtype)
                for rank, descriptor in enumerate(descriptors)
            ]
        finally:
            close_all(descriptors)

    def _mapped_of(self, descriptor: int, size_bytes: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the memory of another rank as a tensor of this one's device."""
        return mapped(self._device, [memory_of(self._device, descriptor, size_bytes)], dtype)


def flatten(parameters: Sequence[nn.Parameter], layout: FlatLayout, ranks: int) -> torch.Tensor:
    """Return the parameters in one flat buffer."""
    first = parameters[0]
    flat = torch.zeros(layout.share * ranks, dtype=first.dtype, device=first.device)
    for parameter, offset in zip(parameters, layout.offsets, strict=True):
        flat[offset : offset + parameter.numel()].copy_(parameter.detach().flatten())
    return flat


class PeerUnit:
    """A `ShardedUnit` over shares that are all in this process's reach."""

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        layout: FlatLayout,
        shares: Shares,
        buffers: GatherBuffers,
    ) -> None:
        self.name = name
        self.gathered_bytes = tensor_bytes(list(shares.tensors))
        self.shard_bytes = shares.share_bytes
        self._parameters = parameters
        self._shapes = [parameter.shape for parameter in parameters]
        self._layout = layout
        self._shares = shares
        self._buffers = buffers
        self._nothing = shares.tensors[shares.mine].new_empty(0)
        # There are few buffers, and making views anew takes the host longer than all else here.
        self._views: dict[GatherBuffer, list[torch.Tensor]] = {}
        self._buffer: GatherBuffer | None = None
        self.release()

    def start(self) -> None:
        """See `ShardedUnit.start`."""
        self._buffer = self._buffers.gather(self._shares)

    def finish(self) -> None:
        """See `ShardedUnit.finish`."""
        buffer = self._buffer
        assert buffer is not None
        self._buffers.wait(buffer)
        if buffer not in self._views:
            self._views[buffer] = [
                buffer.whole[offset : offset + math.prod(shape)].view(shape)
                for shape, offset in zip(self._shapes, self._layout.offsets, strict=True)
            ]
        for parameter, view in zip(self._parameters, self._views[buffer], strict=True):
            parameter.data = view

    def release(self) -> None:
        """See `ShardedUnit.release`."""
        for parameter in self._parameters:
            parameter.data = self._nothing
        if self._buffer is not None:
            self._buffers.give_back(self._buffer)
        self._buffer = None


class PeerRows:
    """`ShardedRows` over tables that are all in this process's reach: rank r's, [R, H], has the R rows from r R on."""

    def __init__(self, tables_RH: Sequence[torch.Tensor], mine: int) -> None:
        self.shard_bytes = tables_RH[mine].nbytes
        self._tables_RH = tables_RH

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """See `ShardedRows.read`."""
        rows = self._tables_RH[0].shape[0]
        flat_N = ids.flatten()
        owner_N, row_N = flat_N // rows, flat_N % rows
        found_NH = self._tables_RH[0].index_select(0, row_N)
        for rank, table_RH in enumerate(self._tables_RH[1:], start=1):
            found_NH = torch.where((owner_N == rank).unsqueeze(1), table_RH.index_select(0, row_N), found_NH)
        return found_NH
