"""Grouped kernels of back end `cutlass`: what the device needs to know of one tick, uploaded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from alto_kernels.availability import require_compiled
from alto_kernels.cuda_pools import CudaPools
from alto_kernels.upload import upload

if TYPE_CHECKING:
    from alto_kernels.plan import TickPlan

_ALIGNMENT = 16
_LEAST_COLUMNS = 16


class GroupedJobs:
    """The adapters of a tick with their tokens and columns, and a launch for each module that was asked for.

    S has a row a token and as many columns as the largest rank takes in the pools.
    """

    def __init__(self, plan: TickPlan) -> None:
        self._plan = plan
        self._pools = plan.table.pools
        assert isinstance(self._pools, CudaPools)
        # The longest first: blocks start in this order, and the last to start should not be the last to end.
        segments = sorted(plan.segments, key=lambda segment: segment.start - segment.stop)
        columns = [self._pools.columns(segment.slot) for segment in segments]
        groups, tiles, self._tile_count = require_compiled().grouped_layout(
            tokens=plan.tokens,
            groups=[
                (s.slot, s.start, s.stop, s.rank, len(own), own.start, s.scale, s.dropout)
                for s, own in zip(segments, columns, strict=True)
            ],
        )
        self._group_count = len(segments)
        self.saved_shape = (plan.tokens, max((len(own) for own in columns), default=_LEAST_COLUMNS))
        self._tiles_offset = -(-len(groups) // _ALIGNMENT) * _ALIGNMENT
        joined = bytearray(groups.ljust(self._tiles_offset, b"\0") + tiles) or bytearray(_ALIGNMENT)
        self._on_device = upload(torch.frombuffer(joined, dtype=torch.uint8), plan.table.device)
        self._launches: dict[int, Any] = {}

    def launch(self, module: int) -> Any:
        """Return the C++ `GroupedLaunch` of a module."""
        found = self._launches.get(module)
        if found is None:
            found = self._launches[module] = self._make(module)
        return found

    def _make(self, module: int) -> Any:
        table, pools, row_keys = self._plan.table, self._pools, self._plan.row_keys
        assert isinstance(pools, CudaPools)
        in_features, out_features = table.module_shapes[module]
        return require_compiled().GroupedLaunch(
            addresses={
                "groups": self._on_device.data_ptr(),
                "tiles": self._on_device.data_ptr() + self._tiles_offset,
                "row_keys": 0 if row_keys is None else row_keys.data_ptr(),
                "slots": pools.pointers[module].data_ptr(),
                "slot_is_bad": pools.slot_is_bad.data_ptr(),
                "a_pool": pools.a_PK[module].data_ptr(),
                "b_pool": pools.b_NP[module].data_ptr(),
            },
            sizes={
                "pool_columns": pools.capacity,
                "groups": self._group_count,
                "tiles": self._tile_count,
                "saved_columns": self.saved_shape[1],
                "in_features": in_features,
                "out_features": out_features,
                "module": module,
            },
            is_float16=table.dtype == torch.float16,
            gradients_are_bfloat16=table.gradient_dtype == torch.bfloat16,
        )
