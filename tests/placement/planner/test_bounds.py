"""Bounds are proofs: no schedule that anyone finds may beat them."""

import random

import alto_planner
import pytest
from alto_placement.planner import Choice, Duration, Node, Objective, Snapshot, WaitingTask, exact, plan


def instance(seed: int, gpus: int, tasks: int) -> Snapshot:
    draw = random.Random(seed)
    nodes = [Node(f"n{index}", "gpu", 8) for index in range(gpus // 8)]
    waiting = [
        WaitingTask(f"t{i}", "ada", (Choice(draw.choice((1, 2, 4, 8)), Duration.certain(draw.uniform(1, 100))),), 0.0)
        for i in range(tasks)
    ]
    return Snapshot(0.0, nodes, waiting, objective=Objective(makespan=10.0, patience=float("inf")))


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_is_below_every_list_and_search(seed: int) -> None:
    snapshot = instance(seed, 16 if seed % 2 else 64, 12 + 9 * seed)
    read = alto_planner.Reader().read(snapshot)
    found = [
        alto_planner.solve(read, 0.0, 0, only=rule)
        for rule in ("fifo", "longest", "shortest", "mirrored", "smallest_area")
    ]
    searched = plan(snapshot, budget_s=0.05, seed=seed)
    for solution in found:
        assert searched.lower_bound_s <= solution.makespan_s + 1e-9
        assert searched.mean_completion_bound_s <= solution.mean_completion_s + 1e-9
    assert searched.lower_bound_s <= searched.makespan_s
    assert searched.mean_completion_bound_s <= searched.mean_completion_s


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_lies_between_bound_and_plan(seed: int) -> None:
    snapshot = instance(seed, 16, 10)
    ours = plan(snapshot, budget_s=0.1, seed=seed)
    proven = exact.improve(snapshot, ours.placements, ours.makespan_s, 60.0, seed=0, deterministic_s=2.0)
    best = min(ours.makespan_s, proven.makespan_s)
    assert max(ours.lower_bound_s, proven.lower_bound_s) <= best * (1 + 1e-4)
    assert ours.makespan_s <= best * 1.02


def test_completion_bound_counts_a_long_task_whole() -> None:
    nodes = [Node("n0", "gpu", 8)]
    waiting = [WaitingTask("long", "ada", (Choice(1, Duration.certain(1000.0)),), 0.0)]
    assert plan(Snapshot(0.0, nodes, waiting)).mean_completion_bound_s == pytest.approx(1000.0)
