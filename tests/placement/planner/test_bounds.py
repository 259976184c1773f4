"""Bounds are proofs: no schedule that anyone finds may beat them."""

import dataclasses
import random

import alto_planner
import pytest
from alto_placement.planner import (
    Choice,
    Duration,
    Node,
    Objective,
    Part,
    RunningTask,
    Snapshot,
    WaitingTask,
    exact,
    plan,
)
from alto_placement.simulator import violations


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
    snapshot = instance(seed, 16, 8)
    ours = plan(snapshot, budget_s=0.1, seed=seed)
    known = alto_planner.solve(alto_planner.Reader().read(snapshot), 0.0, 0)
    proven = exact.improve(snapshot, known, 60.0, seed=0)
    best = min(ours.makespan_s, proven.solution.makespan_s if proven.solution else known.makespan_s)
    assert max(ours.lower_bound_s, proven.lower_bound_s) <= best * (1 + 1e-4)
    assert ours.makespan_s <= best * 1.02


def test_where_the_solver_finds_a_better_plan_it_is_the_plan() -> None:
    draw = random.Random("odd 13")
    nodes = [Node(f"n{index}", "gpu", 8) for index in range(4)]
    running = [
        RunningTask(f"r{i}", "ada", (Part(f"n{i}", (0, 1, 2)),), 0.0, draw.uniform(10, 80), 90.0) for i in range(2)
    ]
    waiting = [
        WaitingTask(
            f"t{i}", "ada", (Choice(draw.choice((1, 2, 3, 5, 6)), Duration.certain(draw.uniform(1, 100))),), 0.0
        )
        for i in range(15)
    ]
    snapshot = Snapshot(0.0, nodes, waiting, running, objective=Objective(makespan=10.0, patience=float("inf")))
    searched = plan(snapshot, budget_s=0.3)
    thought_over = plan(snapshot, budget_s=10.0)
    assert searched.gap > 0.05, "local search alone is stuck"
    assert thought_over.source == "CP-SAT"
    assert thought_over.gap < 1e-4
    assert not violations(snapshot, thought_over)
    again = plan(snapshot, effort=thought_over.effort)
    assert tuple(again.placements) == tuple(thought_over.placements)


def test_the_solver_is_not_asked_about_what_it_does_not_know() -> None:
    snapshot = instance(1, 16, 10)
    assert exact.applicable(snapshot, alto_planner.Reader().read(snapshot), 50)
    first, *rest = snapshot.waiting
    for changed in (
        dataclasses.replace(snapshot, waiting=[dataclasses.replace(first, priority=1), *rest]),
        dataclasses.replace(snapshot, waiting=[dataclasses.replace(first, begun=True), *rest]),
        dataclasses.replace(snapshot, waiting=[dataclasses.replace(first, not_before_s=5.0), *rest]),
        dataclasses.replace(snapshot, objective=Objective(patience=0.0, min_patience_s=0.0)),
        dataclasses.replace(snapshot, running=[RunningTask("late", "ada", (Part("n0", (0,)),), -9.0, -1.0, 0.0)]),
    ):
        assert not exact.applicable(changed, alto_planner.Reader().read(changed), 50)


def test_completion_bound_counts_a_long_task_whole() -> None:
    nodes = [Node("n0", "gpu", 8)]
    waiting = [WaitingTask("long", "ada", (Choice(1, Duration.certain(1000.0)),), 0.0)]
    assert plan(Snapshot(0.0, nodes, waiting)).mean_completion_bound_s == pytest.approx(1000.0)
