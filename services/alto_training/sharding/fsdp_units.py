"""Shares of parameters by torch's FSDP2: it partitions and gathers, `gather_order` says when.

FSDP2 puts its hooks on the module it is applied to. That is a list of modules here, which is never called, so its
hooks never run and the order of gathers is ours alone.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from alto_training.sharding.units import ShardedRows, ShardedUnit, tensor_bytes


class FsdpEngine:
    """A `ShardingEngine` over the ranks of `group`; `device_type` is where the weights live ("cpu", "cuda")."""

    name = "fsdp2"
    in_lock_step = True
    in_place = False
    uncounted_bytes = 0

    def __init__(self, group: dist.ProcessGroup, device_type: str) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        self.ranks = dist.get_world_size(group)
        self._mesh = DeviceMesh.from_group(group, device_type)

    def shard(self, name: str, modules: nn.Sequential) -> ShardedUnit:
        """See `ShardingEngine.shard`."""
        from torch.distributed.fsdp import fully_shard

        gathered_bytes = tensor_bytes(list(modules.parameters()))
        fully_shard(modules, mesh=self._mesh, reshard_after_forward=True)
        return _FsdpUnit(name, gathered_bytes, modules)

    def shard_rows(self, embedding: nn.Embedding) -> ShardedRows | None:
        """See `ShardingEngine.shard_rows`: a gather is all there is."""
        return None


class _FsdpUnit:
    def __init__(self, name: str, gathered_bytes: int, modules: Any) -> None:
        self.name = name
        self.gathered_bytes = gathered_bytes
        self.shard_bytes = tensor_bytes([parameter.to_local() for parameter in modules.parameters()])
        self._modules = modules
        self._handle: Any = None

    def start(self) -> None:
        self._handle = self._modules.unshard(async_op=True)

    def finish(self) -> None:
        self._handle.wait()
        self._handle = None

    def release(self) -> None:
        self._modules.reshard()
