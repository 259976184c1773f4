"""Back end `cutlass`: what the device needs to know of one tick, built on the host once and uploaded in one piece."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from alto_kernels.availability import require_compiled
from alto_kernels.cuda_pools import CudaPools, LaunchShape
from alto_kernels.upload import upload_parts

if TYPE_CHECKING:
    from alto_kernels.plan import TickPlan

BLOCK_COLUMNS = 64
_BLOCK_ROWS = 128
_KEPT_LAYOUTS = 4
# Pairs of token tiles that sweep the weight together and so share it in the L2 cache; measured on an H100.
_PAIRS_IN_GROUP = 8


class TickJobs:
    """The layout of a tick on tiles and, for each shape of launch, its schedule, uploaded in one piece.

    Schedules for `expected` shapes are made at once, others on first use. `used` are the shapes that were asked for.
    Launches of one plan must follow each other on one stream: they share counters.
    """

    def __init__(self, plan: TickPlan, expected: Sequence[LaunchShape]) -> None:
        pools = plan.table.pools
        assert isinstance(pools, CudaPools)
        self.clusters = resident_clusters()
        self.drops = plan.row_keys is not None
        self._device = plan.table.device
        self._layout = require_compiled().TickLayout(
            tokens=plan.tokens,
            segments=[
                (s.slot, s.start, s.stop, s.rank, pools.first_column(s.slot), s.scale, s.dropout, s.slot in plan.fresh)
                for s in plan.segments
            ],
        )
        self.saved_shape = (max(self._layout.saved_rows, _BLOCK_ROWS), BLOCK_COLUMNS)
        self.ready = torch.zeros(self._layout.tiles + 2, dtype=torch.int32, device=self._device)
        self.expected = expected
        self.used: dict[LaunchShape, None] = {}
        self._keep: list[torch.Tensor] = []
        self._block_gradients: torch.Tensor | None = None
        layout = self._layout
        parts = [layout.extras(), layout.owners(), layout.ready_target(), *_by_token(plan)]
        for shape in expected:
            parts.extend(self._make(shape))
        addresses = self._upload(parts)
        names = ("extras", "owners", "ready_target", "thresholds", "keep_factors")
        self._of_all_launches = dict(zip(names, addresses[:5], strict=True))
        self._of_all_launches |= {
            "ready": self.ready.data_ptr(),
            "row_keys": 0 if plan.row_keys is None else plan.row_keys.data_ptr(),
            "tokens": plan.tokens,
            "saved_rows": self.saved_shape[0],
            "clusters": self.clusters,
        }
        schedules = zip(addresses[5::2], addresses[6::2], strict=True)
        self._tables = {shape: self._tables_of(*found) for shape, found in zip(expected, schedules, strict=True)}

    def tables(self, shape: LaunchShape) -> Any:
        """Return the C++ `TickTables` for `shape`; what was not expected is made now and copied to the device."""
        self.used[shape] = None
        found = self._tables.get(shape)
        if found is None:
            found = self._tables[shape] = self._tables_of(*self._upload(self._make(shape)))
        return found

    def _tables_of(self, items: int, item_offsets: int) -> Any:
        return require_compiled().TickTables(items=items, item_offsets=item_offsets, **self._of_all_launches)

    def block_gradients(self, modules: int, dtype: torch.dtype) -> list[int]:
        """Return device addresses for the dS blocks of so many modules; they are of use within one launch alone."""
        held = self._block_gradients
        if held is None or len(held) < modules:
            held = self._block_gradients = torch.empty(modules, *self.saved_shape, dtype=dtype, device=self._device)
        size = held.stride(0) * held.element_size()
        return [held.data_ptr() + number * size for number in range(modules)]

    def _make(self, shape: LaunchShape) -> tuple[bytes, bytes]:
        made: tuple[bytes, bytes] = self._layout.schedule(
            **shape._asdict(), drops=self.drops, pairs_in_group=_PAIRS_IN_GROUP, clusters=self.clusters
        )
        return made

    def _upload(self, parts: Sequence[bytes]) -> list[int]:
        on_device, starts = upload_parts(parts, self._device)
        self._keep.append(on_device)
        return [on_device.data_ptr() + start for start in starts]


class JobsOfTable:
    """The jobs of a table's latest plans: plans of one layout share them, and others expect the same shapes of launch.

    What ticks of full batches of one length cost the host is then a look-up. Plans of one table run on one stream.
    """

    def __init__(self) -> None:
        self._version = -1
        self._recent: dict[Hashable, TickJobs] = {}
        self._latest: dict[tuple[bool, bool], TickJobs] = {}  # by whether it trains and drops

    def of(self, plan: TickPlan) -> TickJobs:
        """Return the jobs of `plan`, of an earlier plan where its layout is the same and no row keys are needed."""
        if plan.table.version != self._version:
            self._version, self._recent = plan.table.version, {}
        kind = plan.training, plan.row_keys is not None
        layout = plan.training, plan.tokens, plan.segments, plan.fresh
        found = self._recent.pop(layout, None)
        if found is None:
            before = self._latest.get(kind)
            # A plan that was made before its time may never have run.
            found = TickJobs(plan, () if before is None else tuple(before.used or before.expected))
        if plan.row_keys is None:
            self._recent[layout] = found
            if len(self._recent) > _KEPT_LAYOUTS:
                del self._recent[next(iter(self._recent))]
        self._latest[kind] = found
        return found


@cache
def resident_clusters() -> int:
    """Return how many clusters of two thread blocks run at once on the device."""
    return int(require_compiled().resident_clusters())


def _by_token(plan: TickPlan) -> tuple[bytes, bytes]:
    """Return each token's dropout threshold (int32) and keep factor (fp32), empty where nothing drops."""
    if plan.row_keys is None:
        return b"", b""
    thresholds_T = torch.full((plan.tokens,), -(2**31), dtype=torch.int32)
    factors_T = torch.ones(plan.tokens)
    for segment in plan.segments:
        if segment.dropout > 0.0:
            thresholds_T[segment.start : segment.stop] = int(segment.dropout * 2**32) - 2**31
            factors_T[segment.start : segment.stop] = 1.0 / (1.0 - segment.dropout)
    return thresholds_T.numpy().tobytes(), factors_T.numpy().tobytes()
