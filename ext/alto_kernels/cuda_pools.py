"""Back end `cutlass`: bf16 or fp16 copies of all adapters' weights, and where the fp32 masters and the gradients lie.

A module's pools are A [P, in] and B [out, P]; an adapter owns the same range of the P columns in every module, its rank
padded with zeros to a multiple of 16. Addresses go to the device when a slot's occupant changes, never per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from alto_kernels.availability import require_compiled
from alto_kernels.streams import current_stream
from alto_kernels.upload import upload

if TYPE_CHECKING:
    from alto_kernels.table import AdapterTable, Occupant

_GRANULE = 16
_FIRST_CAPACITY = 256


class LaunchShape(NamedTuple):
    """The shape of one launch; its schedule depends on nothing else of the modules."""

    backward: bool
    wants_output: bool  # backward: whether dX is
    in_features: int
    out_features: tuple[int, ...]


class CudaPools:
    """The pools of one table. Every value in them is finite, so that a diverged adapter cannot reach its neighbours."""

    def __init__(self, table: AdapterTable) -> None:
        for in_features, out_features in table.module_shapes:
            if in_features % 8 or out_features % 8:
                raise ValueError(
                    f"module_shapes: ({in_features}, {out_features}), must be multiples of 8 for 'cutlass'"
                )
        self._table = table
        self._ranges: dict[int, range] = {}
        # What was refreshed last, and the same on the device: most ticks have the slots of the one before.
        self._columns_listed: list[tuple[int, int, int, int]] = []
        self._listed = torch.zeros(0, 4, dtype=torch.int32, device=table.device)
        self._slots_listed = torch.zeros(0, dtype=torch.int64, device=table.device)
        self.slot_is_bad = torch.zeros(table.max_slots, dtype=torch.int32, device=table.device)
        # Rows are C++ SlotPointers: addresses of A, B and their gradients, 0 where a module is not adapted.
        self.pointers = torch.zeros(
            len(table.module_shapes), table.max_slots, 4, dtype=torch.int64, device=table.device
        )
        self._allocate(_FIRST_CAPACITY)

    def seat(self, slot: int, occupant: Occupant | None) -> None:
        """Give `slot` its columns and copy its weights, or free them."""
        self._ranges.pop(slot, None)
        rows = torch.zeros(len(self._table.module_shapes), 4, dtype=torch.int64)
        if occupant is not None:
            for module, weights in occupant.weights.items():
                rows[module] = torch.tensor([tensor.data_ptr() for tensor in weights])
        self.pointers[:, slot] = upload(rows, self.pointers.device)
        if occupant is None:
            return
        width = -(-occupant.rank // _GRANULE) * _GRANULE
        self._ranges[slot] = self._find(width)
        self.refresh([slot])

    def columns(self, slot: int) -> range:
        """Return the pool columns of the adapter in `slot`."""
        return self._ranges[slot]

    def first_column(self, slot: int) -> int:
        """Return the first pool column of the adapter in `slot`."""
        return self._ranges[slot].start

    def refresh(self, slots: Sequence[int]) -> None:
        """Copy the fp32 masters of `slots` into the pools, in one launch."""
        if not slots:
            return
        columns = [
            (slot, self._ranges[slot].start, self._table.occupant(slot).rank, len(self._ranges[slot])) for slot in slots
        ]
        if columns != self._columns_listed:
            self._listed = upload(torch.tensor(columns, dtype=torch.int32), self._table.device)
            self._slots_listed = upload(torch.tensor(list(slots)), self._table.device)
            self._columns_listed = columns
        self.slot_is_bad.index_fill_(0, self._slots_listed, 0)
        require_compiled().refresh_pools(
            modules=self._modules.data_ptr(),
            module_count=len(self._table.module_shapes),
            slots=self._listed.data_ptr(),
            slot_count=len(columns),
            pointers=self.pointers.data_ptr(),
            max_slots=self._table.max_slots,
            pool_columns=self.capacity,
            slot_is_bad=self.slot_is_bad.data_ptr(),
            is_float16=self._table.dtype == torch.float16,
            stream=current_stream(self._table.device),
        )

    def launch(self, modules: tuple[int, ...], backward: bool, wants_output: bool) -> tuple[Any, LaunchShape]:
        """Return a C++ `Launch` of modules of one input, made once, and its shape, by which a tick schedules it."""
        found = self._launches.get((modules, backward, wants_output))
        if found is not None:
            return found
        shapes = [self._table.module_shapes[module] for module in modules]
        in_features = shapes[0][0]
        launch = require_compiled().Launch(
            backward=backward,
            is_float16=self._table.dtype == torch.float16,
            gradients_are_bfloat16=self._table.gradient_dtype == torch.bfloat16,
            modules=[
                (
                    module,
                    out_features,
                    self.a_PK[module].data_ptr(),
                    self.b_NP[module].data_ptr(),
                    self.pointers[module].data_ptr(),
                )
                for module, (_, out_features) in zip(modules, shapes, strict=True)
            ],
            pool_columns=self.capacity,
            in_features=in_features,
            slot_is_bad=self.slot_is_bad.data_ptr(),
        )
        shape = LaunchShape(backward, wants_output, in_features, tuple(out_features for _, out_features in shapes))
        self._launches[modules, backward, wants_output] = launch, shape
        return launch, shape

    def _allocate(self, capacity: int) -> None:
        device = self._table.device
        shapes = self._table.module_shapes
        dtype = self._table.dtype
        a_PK = [torch.zeros(capacity, k, dtype=dtype, device=device) for k, _ in shapes]
        b_NP = [torch.zeros(n, capacity, dtype=dtype, device=device) for _, n in shapes]
        addresses = [(a.data_ptr(), b.data_ptr(), k, n) for a, b, (k, n) in zip(a_PK, b_NP, shapes, strict=True)]
        # All at once: where memory runs out on the way, they stay as they were.
        self._modules = torch.tensor(addresses, dtype=torch.int64).to(device)
        self.capacity, self.a_PK, self.b_NP = capacity, a_PK, b_NP
        self._launches: dict[tuple[tuple[int, ...], bool, bool], tuple[Any, LaunchShape]] = {}

    def _find(self, width: int) -> range:
        start = 0
        for taken in sorted(self._ranges.values(), key=lambda columns: columns.start):
            if taken.start - start >= width:
                break
            start = taken.stop
        if start + width > self.capacity:
            self._allocate(max(2 * self.capacity, -(-(start + width) // 64) * 64))
            self.refresh(tuple(self._ranges))
        return range(start, start + width)
