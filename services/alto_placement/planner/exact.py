"""CP-SAT for small instances: a proven bound, and a better plan where local search is stuck.

OR-Tools is imported on first use. Symmetry presolve is off: it can lose a complete hint and end without a solution.
One worker and a deterministic limit make its answer repeatable; an answer cut off by the wall clock is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alto_placement.planner.fitting import matches
from alto_placement.planner.model import NodeState, Part, Placement, Snapshot

TICKS = 100_000  # the makespan of the known plan in solver ticks
DETERMINISTIC_S_PER_S = 0.5  # solver work per second of budget, low enough that the wall clock rarely decides


@dataclass(frozen=True)
class ExactAnswer:
    """What CP-SAT found: placements (None when nothing better), their makespan and a proven bound, from now."""

    placements: tuple[Placement, ...] | None
    makespan_s: float
    lower_bound_s: float


def applicable(snapshot: Snapshot, most_tasks: int) -> bool:
    """Return whether the instance is one that CP-SAT is asked about: few rigid tasks, each on one node, no limits."""
    ready = [node for node in snapshot.nodes if node.state is NodeState.READY]
    limited = any(tenant.quota_gpus is not None for tenant in snapshot.tenants)
    if not snapshot.waiting or len(snapshot.waiting) > most_tasks or limited or snapshot.reservations:
        return False
    return all(
        len(task.choices) == 1
        and task.not_before_s <= snapshot.now_s
        and any(matches(task.choices[0], node) and node.gpus >= task.choices[0].gpus for node in ready)
        for task in snapshot.waiting
    )


def improve(
    snapshot: Snapshot,
    known: Sequence[Placement],
    makespan_s: float,
    budget_s: float,
    seed: int,
    deterministic_s: float | None = None,
) -> ExactAnswer:
    """Minimise the makespan from the plan `known` (`makespan_s` long) within `budget_s` of wall time.

    `deterministic_s` is the limit in the solver's own unit of work, by default half of the budget.
    """
    from ortools.sat.python import cp_model

    scale = TICKS / makespan_s
    model: Any = cp_model.CpModel()
    nodes = [node for node in snapshot.nodes if node.state is NodeState.READY]
    at = {node.node_id: index for index, node in enumerate(nodes)}
    hints = {placement.task_id: placement for placement in known}
    end = model.new_int_var(0, TICKS, "makespan")
    on_node: list[list[tuple[Any, int]]] = [[] for _ in nodes]
    everywhere: list[tuple[Any, int]] = []
    starts: dict[str, Any] = {}
    chosen: dict[str, list[tuple[int, Any]]] = {}
    for task in snapshot.waiting:
        choice = task.choices[0]
        # Rounded down: a bound in ticks stays a bound in seconds.
        length = max(1, int(choice.duration.expected_s * scale))
        start = model.new_int_var(0, TICKS - length, "")
        model.add(start + length <= end)
        everywhere.append((model.new_fixed_size_interval_var(start, length, ""), choice.gpus))
        starts[task.task_id] = start
        chosen[task.task_id] = []
        hint = hints[task.task_id]
        model.add_hint(start, min(TICKS - length, max(0, round((hint.start_s - snapshot.now_s) * scale))))
        for index, node in enumerate(nodes):
            if matches(choice, node) and node.gpus >= choice.gpus:
                here = model.new_bool_var("")
                interval = model.new_optional_fixed_size_interval_var(start, length, here, "")
                on_node[index].append((interval, choice.gpus))
                chosen[task.task_id].append((index, here))
                model.add_hint(here, at.get(hint.parts[0].node_id) == index)
        model.add_exactly_one(here for _, here in chosen[task.task_id])
    for running in snapshot.running:
        for part in running.parts if not running.guest_of else ():
            if part.node_id in at:
                length = max(0, int((running.expected_end_s - snapshot.now_s) * scale))
                interval = model.new_fixed_size_interval_var(0, length, "")
                on_node[at[part.node_id]].append((interval, len(part.gpu_indices)))
                everywhere.append((interval, len(part.gpu_indices)))
    for index, node in enumerate(nodes):
        if on_node[index]:
            model.add_cumulative([i for i, _ in on_node[index]], [g for _, g in on_node[index]], node.gpus)
    model.add_cumulative([i for i, _ in everywhere], [g for _, g in everywhere], sum(node.gpus for node in nodes))
    model.minimize(end)
    solver: Any = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.symmetry_level = 0
    solver.parameters.random_seed = seed % (1 << 31)
    solver.parameters.max_time_in_seconds = budget_s
    solver.parameters.max_deterministic_time = deterministic_s or budget_s * DETERMINISTIC_S_PER_S
    status = solver.solve(model)
    bound = max(0.0, solver.best_objective_bound) / scale
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE) or solver.wall_time >= budget_s:
        return ExactAnswer(None, makespan_s, bound)
    placements = _rebuild(snapshot, solver.value, starts, chosen, [node.node_id for node in nodes])
    makespan = max((placement.end_s - snapshot.now_s for placement in placements or ()), default=makespan_s)
    if placements is None or makespan >= makespan_s:
        return ExactAnswer(None, makespan_s, bound)
    return ExactAnswer(placements, makespan, bound)


def _rebuild(
    snapshot: Snapshot,
    value: Callable[[Any], int],
    starts: dict[str, Any],
    chosen: dict[str, list[tuple[int, Any]]],
    node_ids: list[str],
) -> tuple[Placement, ...] | None:
    """Place the tasks on the solver's nodes in the order of its starts, each as early as its GPUs allow."""
    free = {node.node_id: [snapshot.now_s] * node.gpus for node in snapshot.nodes}
    for running in snapshot.running:
        for part in running.parts if not running.guest_of else ():
            for gpu in part.gpu_indices:
                free[part.node_id][gpu] = running.expected_end_s
    placements: list[Placement] = []
    for task in sorted(snapshot.waiting, key=lambda row: (value(starts[row.task_id]), row.task_id)):
        node_id = node_ids[next(index for index, here in chosen[task.task_id] if value(here))]
        times = free[node_id]
        # Of the GPUs that are free in time, those that have been so for the shortest while.
        order = sorted(range(len(times)), key=lambda gpu: (times[gpu], gpu))
        start = max(snapshot.now_s, times[order[task.choices[0].gpus - 1]])
        in_time = [gpu for gpu in order if times[gpu] <= start]
        gpus = tuple(sorted(in_time[-task.choices[0].gpus :]))
        end = start + task.choices[0].duration.expected_s
        for gpu in gpus:
            times[gpu] = end
        placements.append(Placement(task.task_id, 0, (Part(node_id, gpus),), start, end))
    return tuple(placements)
