"""The compiled virtual schedule says what a plain one says, whatever happens, to the last bit."""

from collections import Counter
from collections.abc import Iterable

import pytest
from alto_placement.planner import Objective, Snapshot
from alto_placement.simulator import Cluster, Planned, simulate
from alto_planner import FirstCome

from . import plain_first_come
from .random_streams import RandomStream
from .test_first_come import busy_days


def check_same(seen: Iterable[Snapshot]) -> Counter[str]:
    """Show both every snapshot and compare all that they say. Returns how much of what was compared."""
    compiled, plain = FirstCome(), plain_first_come.FirstCome()
    compared: Counter[str] = Counter()
    for snapshot in seen:
        compiled.follow(snapshot)
        plain.follow(snapshot)
        running = sorted(compiled.running())
        assert running == sorted(plain.running())
        assert compiled.line() == plain.line()
        assert compiled.longest_wait_s == plain.longest_wait_s
        gangs = sum(len(parts) > 1 for _, parts, _, _ in running)
        compared.update(running=len(running), line=len(plain.line()), gangs=gangs, waits=plain.longest_wait_s > 0)
    return compared


@pytest.mark.parametrize("first_seed", range(0, 200, 20))
def test_on_random_streams(first_seed: int) -> None:
    compared: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + 20):
        compared += check_same(RandomStream(seed).snapshots(150))
    assert compared["line"] > 20_000
    assert compared["running"] > 2000
    assert compared["gangs"] > 50


def test_on_a_long_stream() -> None:
    assert check_same(RandomStream(1).snapshots(4000))["running"] > 4000


class _Watched(Planned):
    """Keeps the snapshots that the planner was shown."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.seen: list[Snapshot] = []

    def snapshot(self, *args: object) -> Snapshot:
        self.seen.append(super().snapshot(*args))  # type: ignore[arg-type]
        return self.seen[-1]


def test_on_a_busy_cluster_as_the_planner_runs_it() -> None:
    watched = _Watched(Objective(makespan=0.0, fairness=0.0))
    simulate(busy_days(5), Cluster(4, 8), watched)
    assert check_same(watched.seen)["line"] > 1000
