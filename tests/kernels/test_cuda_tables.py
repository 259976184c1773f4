"""What the back end for CUDA keeps between ticks, checked without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alto_kernels import cuda_jobs, cuda_pools
from alto_kernels.cuda_jobs import JobsOfTable
from alto_kernels.cuda_pools import CudaPools, LaunchShape
from alto_kernels.plan import Segment

SHAPE = LaunchShape(backward=False, wants_output=True, in_features=64, out_features=(32,))


class Jobs:
    """Stands for `TickJobs`, whose layouts are compiled."""

    def __init__(self, plan: Any, expected: tuple[LaunchShape, ...]) -> None:
        self.expected = expected
        self.used: dict[LaunchShape, None] = {}


def plan(tokens: int = 8, version: int = 0, row_keys: object = None, fresh: frozenset[int] = frozenset()) -> Any:
    table = SimpleNamespace(version=version)
    segments = (Segment(0, 0, tokens, 8, 1.0, 0.0),)
    return SimpleNamespace(table=table, training=True, tokens=tokens, segments=segments, fresh=fresh, row_keys=row_keys)


@pytest.fixture
def jobs_of_table(monkeypatch: pytest.MonkeyPatch) -> JobsOfTable:
    monkeypatch.setattr(cuda_jobs, "TickJobs", Jobs)
    return JobsOfTable()


def test_plans_of_one_layout_share_jobs_and_no_others_do(jobs_of_table: JobsOfTable) -> None:
    first = jobs_of_table.of(plan())
    assert jobs_of_table.of(plan()) is first
    assert jobs_of_table.of(plan(tokens=9)) is not first
    assert jobs_of_table.of(plan(fresh=frozenset({0}))) is not first
    assert jobs_of_table.of(plan()) is first
    assert jobs_of_table.of(plan(version=1)) is not first
    dropping = jobs_of_table.of(plan(version=1, row_keys=object()))
    assert jobs_of_table.of(plan(version=1, row_keys=object())) is not dropping


def test_what_the_last_tick_launched_is_expected_also_after_plans_that_never_ran(jobs_of_table: JobsOfTable) -> None:
    ran: Any = jobs_of_table.of(plan(tokens=1))
    ran.used[SHAPE] = None
    never_ran: Any = jobs_of_table.of(plan(tokens=2))
    assert never_ran.expected == (SHAPE,)
    found: Any = jobs_of_table.of(plan(tokens=3))
    assert found.expected == (SHAPE,)


def test_pools_that_did_not_find_memory_to_grow_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(refresh_pools=lambda **_: None)
    monkeypatch.setattr(cuda_pools, "require_compiled", lambda: kernels)
    monkeypatch.setattr(cuda_pools, "current_stream", lambda device: 0)
    occupants = {slot: SimpleNamespace(rank=rank, weights={}) for slot, rank in enumerate((128, 256))}
    table: Any = SimpleNamespace(
        module_shapes=[(8, 16)],
        max_slots=2,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        occupant=lambda slot: occupants[slot],
    )
    pools = CudaPools(table)
    pools.seat(0, occupants[0])
    whole_zeros = torch.zeros

    def zeros(*shape: int, **options: Any) -> torch.Tensor:
        if shape[0] == 16:  # B, after A has been found
            raise torch.OutOfMemoryError
        return whole_zeros(*shape, **options)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "zeros", zeros)
        pools.seat(1, occupants[1])
    assert pools.a_PK[0].shape[0] == pools.b_NP[0].shape[1] == pools.capacity == 256
    pools.seat(1, occupants[1])
    assert pools.a_PK[0].shape[0] == pools.b_NP[0].shape[1] == pools.capacity == 512
    assert pools.columns(1) == range(128, 384)
