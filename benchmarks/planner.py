"""Plans for a queue that is all there: makespan against its proven bound, and completion against its bound.

    make bench NAME=planner ARGS="--trace FILE"

Classes are windows of a real trace and synthetic durations (uniform 1..100 s; lognormal, sigma 0.8), 50 to 2,700 tasks
on 64 and 256 GPUs in nodes of 8. Each plan gets `--budget-s` seconds; an independent checker judges it. Beside it,
on the same instances: FIFO, EASY, SJF, LPT, and a CP-SAT plan without nodes, re-dispatched on nodes (arXiv 2604.05426).
Gaps are makespan / proven lower bound - 1, and always against the same bound, the best one known for the instance.
The last line is one JSON object; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import alto_planner
from alto_placement.planner import (
    Choice,
    Duration,
    Node,
    Objective,
    Part,
    RunningTask,
    Snapshot,
    WaitingTask,
    plan,
)
from alto_placement.simulator import Cluster, Job, Planned, simulate, violations
from alto_placement.simulator.baselines import Easy, Fifo, Ordered
from planner_trace import add_trace_argument, jobs_of

# A queue to be emptied: makespan first, completion beside it. Waits start at zero, so lateness has nothing to say.
OBJECTIVE = Objective(makespan=10.0, completion=1.0, lateness=0.0, patience=float("inf"), fairness=0.0)
GPUS_PER_NODE = 8


def instances(trace: list[Job], per_class: int) -> Iterator[tuple[str, list[Job], int]]:
    for gpus in (64, 256):
        for tasks in (50, 200, 1000, 2700):
            for kind in ("philly", "uniform", "lognormal"):
                here = fitting(trace, gpus)
                if kind == "philly" and len(here) < tasks:
                    print(f"  {kind} {gpus}x{tasks}: the trace has {len(here)} jobs that fit", file=sys.stderr)
                    continue
                for seed in range(per_class):
                    draw = random.Random(f"{kind} {gpus} {tasks} {seed}")
                    yield f"{kind} {gpus}x{tasks}", list(durations(kind, tasks, here, draw)), gpus


def fitting(trace: list[Job], gpus: int) -> list[Job]:
    return [job for job in trace if job.gpus <= gpus]


def durations(kind: str, tasks: int, trace: list[Job], draw: random.Random) -> Iterator[Job]:
    if kind == "philly":
        first = draw.randrange(max(1, len(trace) - tasks))
        for job in trace[first : first + tasks]:
            yield dataclasses.replace(job, submit_s=0.0)
        return
    for index in range(tasks):
        seconds = draw.uniform(1, 100) if kind == "uniform" else draw.lognormvariate(3.0, 0.8)
        yield Job(f"{index:05}", 0.0, draw.choice((1, 2, 4, 8)), seconds, seconds, "one")


def snapshot_of(jobs: list[Job], gpus: int) -> Snapshot:
    nodes = tuple(Node(f"n{index}", "gpu", GPUS_PER_NODE) for index in range(gpus // GPUS_PER_NODE))
    waiting = tuple(
        WaitingTask(job.job_id, job.tenant, (Choice(job.gpus, Duration.certain(job.predicted_s)),), 0.0) for job in jobs
    )
    return Snapshot(0.0, nodes, waiting, objective=OBJECTIVE)


def cp_sat_plan(jobs: list[Job], gpus: int, budget_s: float) -> tuple[float, float] | None:
    """Return (makespan, mean completion) of the order that CP-SAT finds without nodes, re-dispatched on nodes."""
    from ortools.sat.python import cp_model

    scale = 100_000 / max(sum(job.gpus * job.predicted_s for job in jobs) / gpus, max(job.predicted_s for job in jobs))
    horizon = 400_000
    model: Any = cp_model.CpModel()
    end = model.new_int_var(0, horizon, "")
    starts = []
    intervals = []
    for job in jobs:
        length = max(1, round(job.predicted_s * scale))
        start = model.new_int_var(0, horizon - length, "")
        model.add(start + length <= end)
        starts.append(start)
        intervals.append(model.new_fixed_size_interval_var(start, length, ""))
    model.add_cumulative(intervals, [job.gpus for job in jobs], gpus)
    model.minimize(end)
    solver: Any = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = budget_s
    solver.parameters.num_workers = 2
    solver.parameters.symmetry_level = 0
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    rank = {job.job_id: solver.value(start) for job, start in zip(jobs, starts, strict=True)}
    outcome = simulate(jobs, Cluster(gpus // GPUS_PER_NODE, GPUS_PER_NODE), Ordered(lambda job: rank[job.job_id]))
    return outcome.makespan_s, outcome.mean_completion_s()


def others(jobs: list[Job], snapshot: Snapshot, gpus: int, budget_s: float) -> dict[str, tuple[float, float] | None]:
    found: dict[str, tuple[float, float] | None] = {}
    for name, policy in (("fifo", Fifo()), ("easy", Easy())):
        outcome = simulate(jobs, Cluster(gpus // GPUS_PER_NODE, GPUS_PER_NODE), policy)
        found[name] = (outcome.makespan_s, outcome.mean_completion_s())
    read = alto_planner.Reader().read(snapshot)
    for name, rule in (("sjf", "shortest"), ("lpt", "longest")):
        solution = alto_planner.solve(read, 0.0, 0, only=rule)
        found[name] = (solution.makespan_s, solution.mean_completion_s)
    found["cp_sat"] = cp_sat_plan(jobs, gpus, budget_s)
    return found


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "instances": len(rows),
        "makespan_gap_mean": round(statistics.fmean(row["gap"] for row in rows), 5),
        "makespan_gap_max": round(max(row["gap"] for row in rows), 5),
        "jct_over_bound": round(statistics.fmean(row["jct"] for row in rows), 4),
        "jct_over_bound_max": round(max(row["jct"] for row in rows), 4),
        "plan_ms_p99": round(percentile([row["plan_ms"] for row in rows], 0.99), 1),
    }
    for name in rows[0]["others"]:
        known = [row["others"][name] for row in rows if row["others"][name] is not None]
        answer[name] = {
            "makespan_gap_mean": round(statistics.fmean(gap for gap, _ in known), 4) if known else None,
            "jct_over_bound": round(statistics.fmean(jct for _, jct in known), 4) if known else None,
            "without_plan": len(rows) - len(known),
        }
    return answer


def small_queue(number: int, trace: list[Job], odd: bool) -> tuple[Snapshot, str]:
    """Return a queue of 10 to 50 tasks; `odd`: of widths that are no powers of two, on nodes that are partly taken."""
    draw = random.Random(f"small {number}")
    kind = ("philly", "uniform", "lognormal")[number % 3]
    gpus = (16, 32, 64)[number // 3 % 3]
    tasks = (10, 20, 35, 50)[number % 4]
    jobs = [job for job in durations(kind, tasks, trace, draw) if job.gpus <= GPUS_PER_NODE]
    if odd:
        jobs = [dataclasses.replace(job, gpus=draw.choice((1, 2, 3, 5, 6, 7))) for job in jobs]
    snapshot = snapshot_of(jobs, gpus)
    if odd:
        longest = max(job.predicted_s for job in jobs)
        running = []
        for node in snapshot.nodes[::2]:
            end_s = draw.uniform(0.1, 0.8) * longest
            part = Part(node.node_id, tuple(range(draw.randrange(1, 6))))
            running.append(RunningTask(f"on {node.node_id}", "one", (part,), 0.0, end_s, end_s))
        snapshot = dataclasses.replace(snapshot, running=tuple(running))
    return snapshot, f"{kind} {gpus}x{len(jobs)}{' odd' if odd else ''}"


def against_proven_optimum(trace: list[Job], count: int, limit_s: float, budget_s: float, odd: bool) -> dict[str, Any]:
    """Compare with CP-SAT, nodes included, on instances of at most 50 tasks.

    CP-SAT has `limit_s` and begins with a fast list. Where it, or our bound, proves the optimum, our makespan is
    compared with that; everywhere it is compared with the better of the two plans.
    """
    from alto_placement.planner import exact

    exact.load()
    over_optimum: list[float] = []
    over_best: list[float] = []
    for number in range(count):
        snapshot, name = small_queue(number, trace, odd)
        ours = plan(snapshot, budget_s=budget_s)
        wrong = violations(snapshot, ours)
        if wrong:
            raise SystemExit(f"{name}: {wrong[:5]}")
        known = alto_planner.solve(alto_planner.Reader().read(snapshot), 0.0, 0)
        theirs = exact.improve(snapshot, known, limit_s, seed=0)
        best = min(ours.makespan_s, theirs.solution.makespan_s if theirs.solution else known.makespan_s)
        proven = max(theirs.lower_bound_s, ours.lower_bound_s) >= best * (1 - 1e-4)
        over_best.append(ours.makespan_s / best - 1)
        if proven:
            over_optimum.append(over_best[-1])
        print(f"  small {name}: proven {proven}, {over_best[-1]:.4%} ({ours.source})", file=sys.stderr)
    return {
        "instances": count,
        "proven": len(over_optimum),
        "over_optimum_mean": round(statistics.fmean(over_optimum), 5) if over_optimum else None,
        "over_optimum_max": round(max(over_optimum), 5) if over_optimum else None,
        "over_best_known_mean": round(statistics.fmean(over_best), 5),
        "over_best_known_max": round(max(over_best), 5),
    }


def with_early_exits(trace: list[Job], per_class: int) -> dict[str, Any]:
    """Re-plan at every event while tasks end at U(0.15, 1) of their prediction; LPT that knows the ends is 1."""
    ratios: dict[str, list[float]] = {}
    for kind in ("philly", "uniform", "lognormal"):
        for gpus, tasks in ((64, 200), (256, 200), (64, 1000)):
            here = fitting(trace, gpus)
            if kind == "philly" and len(here) < tasks:
                continue
            for seed in range(per_class):
                draw = random.Random(f"early {kind} {gpus} {tasks} {seed}")
                jobs = [
                    dataclasses.replace(job, actual_s=job.predicted_s * draw.uniform(0.15, 1.0))
                    for job in durations(kind, tasks, here, draw)
                ]
                policy = Planned(dataclasses.replace(OBJECTIVE, completion=0.0))
                ours = simulate(jobs, Cluster(gpus // GPUS_PER_NODE, GPUS_PER_NODE), policy).makespan_s
                known = snapshot_of([dataclasses.replace(job, predicted_s=job.actual_s) for job in jobs], gpus)
                lpt = alto_planner.solve(alto_planner.Reader().read(known), 0.0, 0, only="longest")
                ratios.setdefault(f"{kind} {gpus}x{tasks}", []).append(ours / lpt.makespan_s)
    print(f"  early exits {ratios}", file=sys.stderr)
    every = [ratio for row in ratios.values() for ratio in row]
    return {
        "over_clairvoyant_lpt_mean": round(statistics.fmean(every), 4),
        "over_clairvoyant_lpt_max": round(max(every), 4),
        "classes": {name: round(statistics.fmean(row), 4) for name, row in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trace_argument(parser)
    parser.add_argument("--per-class", type=int, default=9)
    parser.add_argument("--budget-s", type=float, default=1.0)
    parser.add_argument("--small", type=int, default=24, help="instances for the comparison with proven optima")
    parser.add_argument("--small-limit-s", type=float, default=10.0)
    parser.add_argument("--only", default="", help="only classes whose name contains this")
    options = parser.parse_args()
    trace = jobs_of(options)
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, jobs, gpus in instances(trace, options.per_class):
        if options.only not in name:
            continue
        snapshot = snapshot_of(jobs, gpus)
        began = time.perf_counter()
        answer = plan(snapshot, budget_s=options.budget_s)
        plan_ms = 1000 * (time.perf_counter() - began)
        wrong = violations(snapshot, answer)
        if wrong:
            raise SystemExit(f"{name}: {wrong[:5]}")
        bound, jct_bound = answer.lower_bound_s, answer.mean_completion_bound_s
        row = {
            "gap": answer.makespan_s / bound - 1,
            "jct": answer.mean_completion_s / jct_bound,
            "plan_ms": plan_ms,
            "others": {
                other: None if found is None else (found[0] / bound - 1, found[1] / jct_bound)
                for other, found in others(jobs, snapshot, gpus, options.budget_s).items()
            },
        }
        rows.setdefault(name, []).append(row)
        print(f"  {name}: gap {row['gap']:.3%} jct {row['jct']:.3f} ({answer.source})", file=sys.stderr)
    every = [row for found in rows.values() for row in found]
    result = {
        "benchmark": "planner",
        "all": summary(every),
        "classes": {name: summary(found) for name, found in rows.items()},
        "small": against_proven_optimum(trace, options.small, options.small_limit_s, options.budget_s, odd=False),
        "small_odd": against_proven_optimum(trace, options.small, options.small_limit_s, options.budget_s, odd=True),
        "early_exits": with_early_exits(trace, min(3, options.per_class)),
        "budget_s": options.budget_s,
        "objective": {key: value for key, value in dataclasses.asdict(OBJECTIVE).items() if key != "patience"},
        "trace": options.trace.name,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
