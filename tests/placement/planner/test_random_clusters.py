"""Random clusters and queues: no plan over-commits, every plan can be repeated, every bound holds.

`make bench NAME=planner_random` holds the same promises against many more of them.
"""

from collections.abc import Callable

import pytest
from alto_placement.planner import Snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .random_clusters import PROMISES, snapshots

EXAMPLES = 150


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_every_plan_keeps(promise: Callable[[Snapshot, int], None]) -> None:
    @settings(max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(snapshots(), st.integers(0, 5))
    def keeps(snapshot: Snapshot, seed: int) -> None:
        promise(snapshot, seed)

    keeps()
