"""Which tokens of one tick belong to which slot. Built once a tick, used by every layer."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from alto_kernels.availability import CudaKernels
from alto_kernels.table import AdapterTable, AdapterWeights

if TYPE_CHECKING:
    from alto_kernels.cuda_jobs import TickJobs
    from alto_kernels.grouped_jobs import GroupedJobs

NO_ADAPTER = -1

_plans: weakref.WeakValueDictionary[int, TickPlan] = weakref.WeakValueDictionary()
_next_handle = itertools.count(1)


class Segment(NamedTuple):
    """Tokens [start, stop) with the adapter of `slot`. `dropout` is 0 outside of training."""

    slot: int
    start: int
    stop: int
    rank: int
    scale: float
    dropout: float


class TickPlan:
    """The token ranges of a tick, adapter-major.

    `slots[i]` (or -1: the backbone alone) owns tokens [`offsets[i]`, `offsets[i + 1]`); ranges may be empty. No slot is
    named twice. `row_keys` [T] int32 is each token's dropout key, which carries the trial's seed, its
    sequence and its position (see `reference.keep_mask`); a training plan needs it where a slot drops.

    `fresh` names slots whose gradients backward overwrites instead of adding to them, whatever they held: for the first
    tick of an effective batch, in place of clearing them. Each needs tokens, and each module one backward pass.

    Keep the plan alive until the backward pass is done; a table whose slots changed since refuses it. Its launches
    follow each other on one stream, or with a wait between streams: at once they would wait for each other for ever.
    """

    def __init__(
        self,
        table: AdapterTable,
        slots: Sequence[int],
        offsets: Sequence[int],
        row_keys: torch.Tensor | None = None,
        training: bool = True,
        fresh: Sequence[int] = (),
    ) -> None:
        """Check the ranges and fix the layout; ValueError names the argument that is wrong."""
        _check_ranges(slots, offsets)
        self.fresh = _check_fresh(fresh, slots, offsets, training)
        self.table = table
        self.training = training
        self.tokens = int(offsets[-1])
        self.segments = tuple(
            _segment(table, slot, start, stop, training)
            for slot, start, stop in zip(slots, offsets[:-1], offsets[1:], strict=True)
            if slot != NO_ADAPTER
        )
        self.row_keys = _check_row_keys(row_keys, self)
        self._version = table.version
        # Caches of the back ends, made on first use.
        self.cpu_layers: dict[int, object] = {}
        self.jobs: TickJobs | None = None
        self.grouped_jobs: GroupedJobs | None = None
        if table.kernels == CudaKernels.HOPPER:
            from alto_kernels.cuda_jobs import JobsOfTable

            if table.jobs is None:
                table.jobs = JobsOfTable()
            self.jobs = table.jobs.of(self)
        elif table.kernels == CudaKernels.GROUPED:
            from alto_kernels.grouped_jobs import GroupedJobs

            self.grouped_jobs = GroupedJobs(self)
        # What `forward` keeps of one module for `backward`, as (rows, columns). Read here, outside of the operators,
        # because their shape functions see no plan.
        self.saved_rows, self.saved_columns = _saved_shape(self)
        # Operators take tensors: this one names the plan without becoming a constant of a compiled graph.
        number = next(_next_handle)
        self.handle = torch.tensor([number])
        _plans[number] = self

    def weights(self, segment: Segment, module: int) -> AdapterWeights | None:
        """Return the tensors of `segment`'s adapter for `module`, None where it does not adapt it."""
        return self.table.occupant(segment.slot).weights.get(module)

    def clear_fresh(self, module: int) -> None:
        """Zero the gradients of the `fresh` slots for `module`: for back ends that only add."""
        for segment in self.segments:
            weights = self.weights(segment, module) if segment.slot in self.fresh else None
            if weights is not None:
                weights.grad_a_RK.zero_()
                weights.grad_b_NR.zero_()

    @property
    def is_current(self) -> bool:
        """Whether no slot of the table changed since this plan was made."""
        return self._version == self.table.version

    def check_current(self) -> None:
        """Raise ValueError when a slot of the table changed since this plan was made."""
        if self._version != self.table.version:
            raise ValueError("plan: stale, a slot of its table changed since it was made")


def plan_of(handle: torch.Tensor) -> TickPlan:
    """Return the living plan behind `handle`; RuntimeError when it is gone."""
    plan = _plans.get(int(handle.item()))
    if plan is None:
        raise RuntimeError("plan: it was dropped before its last use; keep a reference until backward is done")
    plan.check_current()
    return plan


def _segment(table: AdapterTable, slot: int, start: int, stop: int, training: bool) -> Segment:
    occupant = table.occupant(slot)
    dropout = occupant.dropout if training else 0.0
    return Segment(slot, int(start), int(stop), occupant.rank, occupant.scale, dropout)


def _saved_shape(plan: TickPlan) -> tuple[int, int]:
    jobs = plan.jobs or plan.grouped_jobs
    if jobs is not None:
        return jobs.saved_shape
    return plan.tokens, max((segment.rank for segment in plan.segments), default=1)


def _check_ranges(slots: Sequence[int], offsets: Sequence[int]) -> None:
    if len(offsets) != len(slots) + 1:
        raise ValueError(f"offsets: {len(offsets)} values for {len(slots)} slots, must be one more than slots")
    if offsets[0] != 0:
        raise ValueError(f"offsets[0]={offsets[0]}: must be 0")
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if stop < start:
            raise ValueError(f"offsets[{i + 1}]={stop}: below offsets[{i}]={start}, must not fall")
    seated = [slot for slot in slots if slot != NO_ADAPTER]
    if len(set(seated)) != len(seated):
        raise ValueError("slots: a slot is named twice")


def _check_fresh(fresh: Sequence[int], slots: Sequence[int], offsets: Sequence[int], training: bool) -> frozenset[int]:
    if fresh and not training:
        raise ValueError("fresh: only a training plan has gradients")
    with_tokens = {slot for slot, (start, stop) in zip(slots, itertools.pairwise(offsets), strict=True) if stop > start}
    for slot in fresh:
        if slot == NO_ADAPTER or slot not in with_tokens:
            raise ValueError(f"fresh: slot {slot} has no tokens in this plan")
    return frozenset(fresh)


def _check_row_keys(row_keys: torch.Tensor | None, plan: TickPlan) -> torch.Tensor | None:
    drops = any(segment.dropout > 0.0 and segment.stop > segment.start for segment in plan.segments)
    if not drops:
        return None
    if row_keys is None:
        raise ValueError("row_keys: needed, a slot of this training plan has dropout")
    if row_keys.dtype != torch.int32 or tuple(row_keys.shape) != (plan.tokens,):
        raise ValueError(f"row_keys: {row_keys.dtype} {tuple(row_keys.shape)}, must be int32 ({plan.tokens},)")
    return row_keys.to(plan.table.device).contiguous()
