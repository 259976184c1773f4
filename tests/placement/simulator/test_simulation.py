"""The simulated cluster, the policies in it, and the judge of plans."""

import dataclasses
import random

import pytest
from alto_placement.planner import Choice, Duration, Node, Objective, Part, Placement, Snapshot, WaitingTask, plan
from alto_placement.simulator import Cluster, Job, Planned, Policy, scaled_to_load, simulate, violations
from alto_placement.simulator.baselines import Easy, Fifo, LeastAttained, Ordered, preemptive_oracle


def jobs(count: int, seed: int = 0) -> list[Job]:
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        predicted = draw.uniform(10.0, 1000.0)
        rows.append(
            Job(f"j{index:04}", draw.uniform(0.0, 2000.0), draw.choice((1, 2, 4, 8, 16)), predicted, predicted, "ada")
        )
    return scaled_to_load(rows, 32, 0.9)


POLICIES: dict[str, Policy] = {
    "fifo": Fifo(),
    "easy": Easy(),
    "sjf": Ordered(lambda job: job.predicted_s),
    "las": LeastAttained(),
    "oracle": preemptive_oracle(),
    "planner": Planned(Objective(makespan=0.0, fairness=0.0), check=True),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_job_ends_after_its_own_time_and_no_gpu_is_held_twice(name: str) -> None:
    rows = jobs(150)
    outcome = simulate(rows, Cluster(4, 8), POLICIES[name])
    assert len(outcome.completion_s) == 150
    for job in rows:
        assert outcome.completion_s[job.job_id] >= job.actual_s - 1e-6


def test_replaying_with_tasks_that_end_early_or_late_keeps_every_plan_feasible() -> None:
    draw = random.Random(1)
    rows = [dataclasses.replace(job, actual_s=job.predicted_s * draw.uniform(0.15, 1.3)) for job in jobs(150)]
    policy = Planned(Objective(fairness=0.0, patience=1.0, min_patience_s=100.0), check=True)
    outcome = simulate(rows, Cluster(4, 8), policy)
    assert len(outcome.completion_s) == 150
    assert outcome.preemptions == 0


def test_the_same_trace_gives_the_same_outcome() -> None:
    rows = jobs(80)
    first = simulate(rows, Cluster(4, 8), Planned(Objective()))
    assert simulate(rows, Cluster(4, 8), Planned(Objective())).completion_s == first.completion_s


def test_the_judge_sees_what_is_wrong() -> None:
    nodes = [Node("n0", "gpu", 2)]
    waiting = [WaitingTask(f"t{i}", "ada", (Choice(1, Duration.certain(10.0)),), 0.0) for i in range(2)]
    snapshot = Snapshot(0.0, nodes, waiting)
    good = plan(snapshot)
    assert not violations(snapshot, good)
    one = Placement("t0", 0, (Part("n0", (0,)),), 0.0, 10.0)
    two = Placement("t1", 0, (Part("n0", (0,)),), 5.0, 15.0)
    for placements, words in (
        ((one, two), "both hold"),
        ((one,), "neither placed"),
        ((one, dataclasses.replace(two, parts=(Part("n0", (0, 1)),))), "not the GPUs"),
        ((one, dataclasses.replace(two, parts=(Part("n0", (2,)),))), "takes no work"),
        ((one, dataclasses.replace(two, start_s=12.0)), "does not last"),
        ((one, dataclasses.replace(two, start_s=-5.0, end_s=5.0)), "too early"),
    ):
        bad = dataclasses.replace(good, placements=placements, makespan_s=20.0)
        assert any(words in found for found in violations(snapshot, bad))
    lying = dataclasses.replace(good, makespan_s=1.0)
    assert violations(snapshot, lying)
