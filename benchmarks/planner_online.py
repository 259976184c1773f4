"""Online scheduling of a real trace: the planner beside FIFO, EASY, LAS, SJF and a preemptive oracle, in virtual time.

    make bench NAME=planner_online ARGS="--trace FILE --load 0.9"

Every policy sees the same arrivals, stretched so that the work is `--load` of the cluster. In the second scenario tasks
end early, at U(0.15, 1) of their predicted time: all policies see predictions, the oracle and the bound what happens.
`larger` is all on four times as many GPUs, arrivals four times as dense: there a task that lasts for days blocks less.
`early_exits` empties queues that are all there while tasks end early: makespan over LPT that knows the ends.
`others` are arrivals beside the trace: its thirds, its jobs drawn anew at its own times of arrival, and synthetic ones
(Poisson, lognormal durations); the objective's settings were chosen on these, not on the whole trace.
The last line is one JSON object; progress goes to stderr. Completion is the mean time from submission to the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import platform
import random
import sys
import time

from alto_placement.planner import Objective
from alto_placement.simulator import Cluster, Job, Outcome, Planned, Policy, TraceError, scaled_to_load, simulate
from alto_placement.simulator.baselines import Easy, Fifo, LeastAttained, Ordered, preemptive_oracle
from planner import with_early_exits
from planner_trace import add_trace_argument, jobs_of

# An operator of a busy shared cluster: completion counts, the makespan of an open queue means nothing.
OBJECTIVE = Objective(makespan=0.0, patience=1.0, min_patience_s=3600.0, fairness=0.0)
WAIT_PATIENCE = 1.25  # x the longest wait of first come first served

FRONT = (1.0, 1.15, 1.25, 1.35, 1.5, 2.0, float("inf"))


def fluid_bound_s(jobs: list[Job], gpus: int) -> float:
    """Return a lower bound on the mean completion: the cluster as one machine, preemptive, smallest area first.

    A job's end is at least its mean busy time plus half its duration; the sum of the mean busy times of areas on one
    preemptive machine is least when the smallest area always runs.
    """
    arrivals = sorted(jobs, key=lambda job: job.submit_s)
    active: list[tuple[float, int, float]] = []  # area, index, left
    busy = [0.0] * len(arrivals)  # integral of time over the processing of each job
    now, index = 0.0, 0
    while index < len(arrivals) or active:
        if not active:
            now = max(now, arrivals[index].submit_s)
        while index < len(arrivals) and arrivals[index].submit_s <= now:
            area = arrivals[index].gpus * arrivals[index].actual_s / gpus
            heapq.heappush(active, (area, index, area))
            index += 1
        area, job, left = heapq.heappop(active)
        until = min(now + left, arrivals[index].submit_s if index < len(arrivals) else float("inf"))
        busy[job] += (until - now) * (until + now) / 2 / area
        if until < now + left:
            heapq.heappush(active, (area, job, left - (until - now)))
        now = until
    relaxed = sum(mean + job.actual_s / 2 - job.submit_s for mean, job in zip(busy, arrivals, strict=True))
    return max(relaxed, sum(job.actual_s for job in jobs)) / len(jobs)


def ending_early(jobs: list[Job], seed: int) -> list[Job]:
    draw = random.Random(seed)
    return [dataclasses.replace(job, actual_s=job.predicted_s * draw.uniform(0.15, 1.0)) for job in jobs]


def measure(name: str, policy: Policy, jobs: list[Job], nodes: int, gpus_per_node: int) -> Outcome:
    began = time.perf_counter()
    outcome = simulate(jobs, Cluster(nodes, gpus_per_node), policy)
    took = time.perf_counter() - began
    print(
        f"  {name:10} completion {outcome.mean_completion_s():10.0f} s  longest wait {outcome.longest_wait_s():10.0f} s"
        f"  preemptions {outcome.preemptions:5}  {outcome.decisions} decisions in {took:.1f} s",
        file=sys.stderr,
    )
    return outcome


def longest_wait_over(outcome: Outcome, other: Outcome) -> float:
    """Return one longest wait over another; where nobody waits, a second counts."""
    return max(1.0, outcome.longest_wait_s()) / max(1.0, other.longest_wait_s())


def scenario(
    jobs: list[Job], nodes: int, gpus_per_node: int, objective: Objective, patience: float
) -> dict[str, object]:
    bound = fluid_bound_s(jobs, nodes * gpus_per_node)
    planned = Planned(objective, wait_patience=patience)
    policies: dict[str, Policy] = {
        "planner": planned,
        "fifo": Fifo(),
        "easy": Easy(),
        "las": LeastAttained(),
        "sjf": Ordered(lambda job: job.predicted_s),
        "smallest_area": Ordered(lambda job: job.predicted_s * job.gpus),
        "oracle": preemptive_oracle(),
    }
    outcomes = {name: measure(name, policy, jobs, nodes, gpus_per_node) for name, policy in policies.items()}
    easy = outcomes["easy"]
    ours = outcomes["planner"]
    delays = sorted(planned.planning_s)
    return {
        "completion_over_bound": round(ours.mean_completion_s() / bound, 4),
        "completion_over_oracle": round(ours.mean_completion_s() / outcomes["oracle"].mean_completion_s(), 4),
        "longest_wait_over_easy": round(longest_wait_over(ours, easy), 4),
        "preemptions": ours.preemptions,
        "plan_ms_p99": round(1000 * delays[int(0.99 * (len(delays) - 1))], 3),
        "others": {
            name: {
                "completion_over_bound": round(outcome.mean_completion_s() / bound, 4),
                "longest_wait_over_easy": round(longest_wait_over(outcome, easy), 4),
                "preemptions": outcome.preemptions,
            }
            for name, outcome in outcomes.items()
            if name != "planner"
        },
    }


def front(jobs: list[Job], nodes: int, gpus_per_node: int, objective: Objective) -> list[dict[str, object]]:
    """Return what each bound by first come first served costs in completion and gives in the longest wait."""
    oracle = simulate(jobs, Cluster(nodes, gpus_per_node), preemptive_oracle()).mean_completion_s()
    easy = simulate(jobs, Cluster(nodes, gpus_per_node), Easy())
    rows: list[dict[str, object]] = []
    for patience in FRONT:
        bounded = Planned(objective, wait_patience=patience)
        outcome = simulate(jobs, Cluster(nodes, gpus_per_node), bounded)
        rows.append(
            {
                "wait_patience": str(patience),
                "completion_over_oracle": round(outcome.mean_completion_s() / oracle, 4),
                "longest_wait_over_easy": round(longest_wait_over(outcome, easy), 4),
            }
        )
        print(f"  front {rows[-1]}", file=sys.stderr)
    return rows


def drawn_anew(jobs: list[Job], seed: int) -> list[Job]:
    """Return jobs of the trace drawn with replacement, at the times at which its jobs arrive."""
    draw = random.Random(seed)
    return [
        dataclasses.replace(draw.choice(jobs), job_id=f"{index:05}", submit_s=job.submit_s)
        for index, job in enumerate(jobs)
    ]


def synthetic(count: int, seed: int) -> list[Job]:
    """Return jobs of lognormal durations (median half an hour, at most ten days) that arrive at random."""
    draw = random.Random(100 + seed)
    found: list[Job] = []
    now_s = 0.0
    for index in range(count):
        now_s += draw.expovariate(1 / 60)
        gpus = draw.choices((1, 2, 4, 8, 16, 32), (50, 10, 15, 20, 4, 1))[0]
        seconds = min(draw.lognormvariate(7.5, 1.8), 10 * 86400.0)
        found.append(Job(f"{index:05}", now_s, gpus, seconds, seconds, "one"))
    return found


def others(
    trace: list[Job], load: float, nodes: int, gpus_per_node: int, objective: Objective, patience: float
) -> dict[str, object]:
    """Return completion over the oracle and longest wait over EASY's for arrivals beside the trace, and their means."""
    size = len(trace)
    cases = {f"third {k}": trace[k * size // 3 : (k + 1) * size // 3] for k in range(3)}
    for seed in range(3):
        cases |= {f"drawn anew {seed}": drawn_anew(trace, seed), f"synthetic {seed}": synthetic(3000, seed)}
        cases[f"synthetic {seed} ending early"] = ending_early(cases[f"synthetic {seed}"], seed)
    found: dict[str, object] = {}
    pairs: list[tuple[float, float]] = []
    for name, drawn in cases.items():
        jobs = scaled_to_load([job for job in drawn if job.gpus <= nodes * gpus_per_node], nodes * gpus_per_node, load)
        oracle, easy, ours = (
            simulate(jobs, Cluster(nodes, gpus_per_node), policy)
            for policy in (preemptive_oracle(), Easy(), Planned(objective, wait_patience=patience))
        )
        completion = ours.mean_completion_s() / oracle.mean_completion_s()
        pairs.append((completion, longest_wait_over(ours, easy)))
        found[name] = {
            "completion_over_oracle": round(completion, 4),
            "longest_wait_over_easy": round(pairs[-1][1], 4),
        }
        print(f"  {name} {found[name]}", file=sys.stderr)
    return found | {
        "completion_over_oracle_mean": round(sum(pair[0] for pair in pairs) / len(pairs), 4),
        "longest_wait_over_easy_mean": round(sum(pair[1] for pair in pairs) / len(pairs), 4),
    }


def on_cluster(trace: list[Job], nodes: int, options: argparse.Namespace, objective: Objective) -> dict[str, object]:
    """Return all that is measured online on a cluster of so many nodes."""
    gpus = nodes * options.gpus_per_node
    size = nodes, options.gpus_per_node
    found: dict[str, object] = {"gpus": gpus}
    for name, drawn in (("exact", trace), ("ending_early", ending_early(trace, options.seed))):
        print(f"{name}: {len(drawn)} jobs, load {options.load} on {gpus} GPUs", file=sys.stderr)
        arrivals = scaled_to_load(drawn, gpus, options.load)
        found[name] = scenario(arrivals, *size, objective, options.wait_patience) | {
            "front": front(arrivals, *size, objective)
        }
    print(f"other arrivals on {gpus} GPUs", file=sys.stderr)
    found["others"] = others(trace, options.load, *size, objective, options.wait_patience)
    by_duration = dataclasses.replace(objective, patience=4.0, min_patience_s=4 * 3600.0)
    found["others_by_duration_alone"] = others(trace, options.load, *size, by_duration, float("inf"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trace_argument(parser)
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-class", type=int, default=3, help="queues of each class emptied with early exits")
    parser.add_argument("--jobs", type=int, default=0, help="only the first so many; 0 for all")
    parser.add_argument("--patience", type=float, default=OBJECTIVE.patience, help="of a task, by its duration")
    parser.add_argument("--wait-patience", type=float, default=WAIT_PATIENCE, help="of all, by first come first served")
    options = parser.parse_args()
    objective = dataclasses.replace(OBJECTIVE, patience=options.patience)
    gpus = options.nodes * options.gpus_per_node
    jobs = jobs_of(options)
    jobs = [job for job in (jobs[: options.jobs] if options.jobs else jobs) if job.gpus <= gpus]
    result = {"benchmark": "planner_online"} | on_cluster(jobs, options.nodes, options, objective)
    result["larger"] = on_cluster(jobs, 4 * options.nodes, options, objective)
    print("a queue emptied, tasks ending early", file=sys.stderr)
    result["early_exits"] = with_early_exits(jobs, options.per_class)
    result |= {
        "trace": options.trace.name,
        "load": options.load,
        "jobs": len(jobs),
        "wait_patience": options.wait_patience,
        "objective": {name: str(value) for name, value in dataclasses.asdict(objective).items()},
        "seed": options.seed,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except TraceError as error:
        raise SystemExit(str(error)) from None
