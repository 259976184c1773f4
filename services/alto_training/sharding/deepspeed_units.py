"""Shares of parameters by DeepSpeed's ZeRO-3: it partitions and gathers, `gather_order` says when.

ZeRO-3's own engine learns the order of gathers from a trace, keeps small parameters or lets them go until the trace is
complete, and so may gather in another order on a rank with other work. Here its partitioned parameters are used
without its engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from alto_training.sharding.deepspeed_extension import load_extension
from alto_training.sharding.units import ShardedRows, ShardedUnit, tensor_bytes


class DeepSpeedEngine:
    """A `ShardingEngine` over the ranks of `group`. Needs torch.distributed started and LOCAL_RANK set."""

    name = "deepspeed"
    in_lock_step = True
    in_place = False
    uncounted_bytes = 0

    def __init__(self, group: dist.ProcessGroup) -> None:
        import deepspeed

        self.ranks = dist.get_world_size(group)
        self._zero = deepspeed.zero
        self._group = group
        load_extension()
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)

    def shard(self, name: str, modules: nn.Sequential) -> ShardedUnit:
        """See `ShardingEngine.shard`."""
        gathered_bytes = tensor_bytes(list(modules.parameters()))
        dtype = next(modules.parameters()).dtype
        self._zero.Init(module=modules, data_parallel_group=self._group, mem_efficient_linear=False, dtype=dtype)
        return _DeepSpeedUnit(name, gathered_bytes, list(modules.parameters()))

    def shard_rows(self, embedding: nn.Embedding) -> ShardedRows | None:
        """See `ShardingEngine.shard_rows`: a gather is all there is."""
        return None


class _DeepSpeedUnit:
    def __init__(self, name: str, gathered_bytes: int, parameters: list[Any]) -> None:
        self.name = name
        self.gathered_bytes = gathered_bytes
        self.shard_bytes = tensor_bytes([parameter.ds_tensor for parameter in parameters])
        self._parameters = parameters
        self._handle: Any = None

    def start(self) -> None:
        self._handle = self._parameters[0].all_gather_coalesced(self._parameters)

    def finish(self) -> None:
        self._handle.wait()
        self._handle = None

    @torch.no_grad()
    def release(self) -> None:
        self._parameters[0].partition(self._parameters)
