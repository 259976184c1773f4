"""Random clusters and queues: no plan over-commits, every plan can be repeated, every bound holds.

`make bench NAME=planner_random` holds the same promises against many more of them.
"""

import math
from collections.abc import Callable

import pytest
from alto_placement.planner import Snapshot
from alto_planner import FirstCome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .random_clusters import PROMISES, snapshots

EXAMPLES = 150


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_every_plan_keeps(promise: Callable[[Snapshot, int], None]) -> None:
    @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
    @given(snapshots(), st.integers(0, 5))
    def keeps(snapshot: Snapshot, seed: int) -> None:
        promise(snapshot, seed)

    keeps()


@settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(snapshots(), min_size=2, max_size=4))
def test_the_virtual_schedule_follows_whatever_comes(seen: list[Snapshot]) -> None:
    """Nodes and tasks come, change, go and return: nothing is lost or counted twice, the measure stays one."""
    virtual = FirstCome()
    for snapshot in seen:
        virtual.follow(snapshot)
        assert 0.0 <= virtual.longest_wait_s < math.inf
        ids = [*virtual.line(), *(task_id for task_id, *_ in virtual.running())]
        assert len(ids) == len(set(ids))
