"""The virtual schedule that bounds waits: those of first come first served, whatever really happens beside it."""

import dataclasses
import random

import pytest
from alto_placement.first_come import WaitBound
from alto_placement.planner import (
    Choice,
    Duration,
    InvalidRowError,
    Node,
    NodeState,
    Objective,
    Part,
    RunningTask,
    Snapshot,
    WaitingTask,
)
from alto_placement.simulator import Cluster, Job, Planned, scaled_to_load, simulate
from alto_placement.simulator.baselines import Easy
from alto_planner import FirstCome

NODES = (Node("n0", "gpu", 4), Node("n1", "gpu", 4))


def busy_days(seed: int) -> list[Job]:
    draw = random.Random(seed)
    rows = []
    for index in range(400):
        seconds = min(draw.lognormvariate(7.0, 1.5), 100_000.0)
        gpus = draw.choices((1, 2, 4, 8, 16), (50, 15, 20, 10, 5))[0]
        rows.append(Job(f"j{index:04}", draw.expovariate(1e-4) + 60.0 * index, gpus, seconds, seconds, "ada"))
    return scaled_to_load(sorted(rows, key=lambda job: job.submit_s), 32, 0.95)


def waiting(task_id: str, gpus: int, seconds: float, arrived_s: float = 0.0) -> WaitingTask:
    choice = Choice(gpus, Duration.certain(seconds), "gpu", one_node=True)
    return WaitingTask(task_id, "ada", (choice,), arrived_s)


def running(row: WaitingTask, node_id: str, started_s: float, end_s: float) -> RunningTask:
    part = Part(node_id, tuple(range(row.choices[0].gpus)))
    return RunningTask(row.task_id, "ada", (part,), started_s, end_s, end_s, resume=row.choices)


@pytest.mark.parametrize("seed", range(4))
def test_its_longest_wait_is_that_of_first_come_first_served(seed: int) -> None:
    rows = busy_days(seed)
    bounded = Planned(Objective(makespan=0.0, fairness=0.0), wait_patience=100.0)
    simulate(rows, Cluster(4, 8), bounded)
    served = simulate(rows, Cluster(4, 8), Easy())
    # What was foreseen for the first in line counts, and some were let in sooner.
    assert 0.99 <= bounded.bound.longest_wait_s / served.longest_wait_s() <= 1.15


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_bound_by_it_keeps_the_longest_wait_near_it(seed: int) -> None:
    rows = busy_days(seed)
    objective = Objective(makespan=0.0, fairness=0.0, patience=100.0, min_patience_s=600.0)
    free = simulate(rows, Cluster(4, 8), Planned(objective)).longest_wait_s()
    bounded = simulate(rows, Cluster(4, 8), Planned(objective, check=True, wait_patience=1.25)).longest_wait_s()
    served = simulate(rows, Cluster(4, 8), Easy()).longest_wait_s()
    assert bounded <= 1.5 * served
    assert bounded < free


def test_what_ends_early_in_reality_ends_early_virtually() -> None:
    long, next_one = waiting("long", 4, 1000.0), waiting("next", 4, 10.0)

    def wait_s(ended_s: float) -> float:
        virtual = FirstCome()
        virtual.follow(Snapshot(0.0, NODES[:1], [long, next_one]))
        virtual.follow(Snapshot(1.0, NODES[:1], [next_one], [running(long, "n0", 0.0, 1000.0)]))
        virtual.follow(Snapshot(ended_s, NODES[:1], [next_one]))
        virtual.follow(Snapshot(2000.0, NODES[:1]))
        return virtual.longest_wait_s

    # Its wait was foreseen to be 1000 s: that stays the measure, though it went faster.
    assert wait_s(300.0) == wait_s(1000.0) == pytest.approx(1000.0)
    virtual = FirstCome()
    virtual.follow(Snapshot(0.0, NODES[:1], [long]))
    virtual.follow(Snapshot(1.0, NODES[:1], [], [running(long, "n0", 0.0, 1000.0)]))
    virtual.follow(Snapshot(300.0, NODES[:1], [waiting("late", 4, 10.0, 300.0)]))
    assert virtual.longest_wait_s == 0.0


def test_a_forecast_that_is_corrected_while_the_task_runs_counts() -> None:
    long, narrow = waiting("long", 4, 1000.0), waiting("narrow", 1, 10.0, 1.0)
    virtual = FirstCome()
    virtual.follow(Snapshot(0.0, NODES[:1], [long]))
    virtual.follow(Snapshot(1.0, NODES[:1], [], [running(long, "n0", 0.0, 400.0)]))
    virtual.follow(Snapshot(500.0, NODES[:1], [dataclasses.replace(narrow, arrived_s=500.0)]))
    assert virtual.longest_wait_s == 0.0


def test_what_no_node_can_hold_now_holds_up_nobody() -> None:
    virtual = FirstCome()
    cordoned = dataclasses.replace(NODES[1], state=NodeState.CORDONED)
    wide = WaitingTask("wide", "ada", (Choice(8, Duration.certain(10.0), "gpu"),), 0.0)
    virtual.follow(Snapshot(0.0, [NODES[0], cordoned], [wide]))
    virtual.follow(Snapshot(500.0, [NODES[0], cordoned], [wide, waiting("narrow", 4, 10.0, 500.0)]))
    assert virtual.longest_wait_s == 0.0
    virtual.follow(Snapshot(600.0, NODES, [wide]))
    assert virtual.longest_wait_s == pytest.approx(600.0)


def test_a_lost_node_makes_its_tasks_wait_again() -> None:
    one = waiting("one", 4, 100.0)
    virtual = FirstCome()
    virtual.follow(Snapshot(0.0, NODES[:1], [one]))
    virtual.follow(Snapshot(50.0, [], [one]))
    virtual.follow(Snapshot(80.0, NODES[1:], [one]))
    assert virtual.longest_wait_s == pytest.approx(80.0)


def test_it_begins_with_what_runs_already() -> None:
    virtual = FirstCome()
    long = waiting("long", 4, 1000.0)
    virtual.follow(Snapshot(100.0, NODES[:1], [waiting("next", 4, 10.0, 90.0)], [running(long, "n0", 0.0, 1000.0)]))
    assert virtual.longest_wait_s == pytest.approx(910.0)


def test_without_a_patience_the_snapshot_stays_as_it_is() -> None:
    snapshot = Snapshot(0.0, NODES, [waiting("one", 4, 100.0)])
    assert WaitBound(float("inf")).applied(snapshot) is snapshot
    assert WaitBound(2.0).applied(snapshot).objective.longest_wait_s == 0.0


def test_a_snapshot_that_cannot_be_read_is_refused_and_changes_nothing() -> None:
    bound = WaitBound(1.0)
    bound.applied(Snapshot(0.0, NODES[:1], [waiting("long", 4, 1000.0), waiting("next", 4, 10.0)]))
    endless = waiting("endless", 4, float("inf"))
    with pytest.raises(InvalidRowError, match="endless"):
        bound.applied(Snapshot(5000.0, NODES, [endless]))
    assert bound.longest_wait_s == pytest.approx(1000.0)
    # Had that snapshot been followed, "next" would have ended long ago.
    bound.applied(Snapshot(1.0, NODES[:1], [waiting("next", 4, 10.0), waiting("last", 4, 10.0)]))
    assert bound.longest_wait_s == pytest.approx(1000.0)
