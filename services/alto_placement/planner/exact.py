"""CP-SAT for small instances: a proven bound, and a better plan where local search is stuck.

OR-Tools is imported on first use. Symmetry presolve is off: it can lose a complete hint and end without a solution.
So are linear relaxations: without them the same work found a better or equal plan on seven of eight odd instances.
One worker makes it repeatable: it goes through the same plans again.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import alto_planner

from alto_placement.planner.fitting import matches
from alto_placement.planner.model import NodeState, Snapshot

TICKS = 100_000  # the makespan of the known plan in solver ticks
MOST_PLACES = 1000  # tasks x nodes: the model of more takes longer to build and presolve than a plan may


@dataclass(frozen=True)
class ExactAnswer:
    """What CP-SAT found: a plan (None when none is shorter), a proven bound on the makespan from now, and how many
    plans the solver went through to find it.
    """

    solution: alto_planner.Solution | None
    lower_bound_s: float
    steps: int


def applicable(snapshot: Snapshot, read: alto_planner.ReadSnapshot, most_tasks: int) -> bool:
    """Return whether the instance is one that CP-SAT is asked about: few rigid tasks, each on one node, equal but for
    their sizes, no limits, and nothing that runs beyond its prediction.
    """
    if not snapshot.waiting or len(snapshot.waiting) > most_tasks or snapshot.objective.makespan <= 0:
        return False
    if any(running.expected_end_s <= snapshot.now_s for running in snapshot.running) or not read.plain():
        return False
    ready = [node for node in snapshot.nodes if node.state is NodeState.READY]
    return len(snapshot.waiting) * len(ready) <= MOST_PLACES and all(
        len(task.choices) == 1
        and any(matches(task.choices[0], node) and node.gpus >= task.choices[0].gpus for node in ready)
        for task in snapshot.waiting
    )


def load() -> None:
    """Import OR-Tools, which takes a second: call it in a thread before the first plan that needs it."""
    importlib.import_module("ortools.sat.python.cp_model")


def improve(
    snapshot: Snapshot, known: alto_planner.Solution, budget_s: float, seed: int, steps: int = 0
) -> ExactAnswer:
    """Minimise the makespan, beginning with the plan `known`, within `budget_s` of wall time.

    With the `steps` of an earlier answer it stops at the plan found then. Mean completion is improved as far as the
    nodes found and the makespan allow.
    """
    from ortools.sat.python import cp_model

    class Steps(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]  # its stubs are Any
        """Counts the plans that the solver goes through, each shorter than the last."""

        count = 0

        def on_solution_callback(self) -> None:
            self.count += 1
            if self.count == steps:
                self.stop_search()

    scale = TICKS / known.makespan_s
    model: Any = cp_model.CpModel()
    nodes = [(index, node) for index, node in enumerate(snapshot.nodes) if node.state is NodeState.READY]
    end = model.new_int_var(0, TICKS, "makespan")
    on_node: dict[int, list[tuple[Any, int]]] = {index: [] for index, _ in nodes}
    everywhere: list[tuple[Any, int]] = []
    starts: list[Any] = []
    chosen: list[list[tuple[int, Any]]] = []
    for row, task in enumerate(snapshot.waiting):
        choice = task.choices[0]
        # Rounded down: a bound in ticks stays a bound in seconds.
        length = max(1, int(choice.duration.expected_s * scale))
        start = model.new_int_var(0, TICKS - length, "")
        model.add(start + length <= end)
        everywhere.append((model.new_fixed_size_interval_var(start, length, ""), choice.gpus))
        starts.append(start)
        chosen.append([])
        placement = known.placement(row)
        assert placement is not None, "a task that a ready node can hold has a place"
        _, parts, start_s, _ = placement
        model.add_hint(start, min(TICKS - length, max(0, round((start_s - snapshot.now_s) * scale))))
        for index, node in nodes:
            if matches(choice, node) and node.gpus >= choice.gpus:
                here = model.new_bool_var("")
                interval = model.new_optional_fixed_size_interval_var(start, length, here, "")
                on_node[index].append((interval, choice.gpus))
                chosen[-1].append((index, here))
                model.add_hint(here, parts[0][0] == index)
        model.add_exactly_one(here for _, here in chosen[-1])
    at = {node.node_id: index for index, node in nodes}
    for running in snapshot.running:
        for part in running.parts if not running.guest_of else ():
            if part.node_id in at:
                length = max(0, int((running.expected_end_s - snapshot.now_s) * scale))
                interval = model.new_fixed_size_interval_var(0, length, "")
                on_node[at[part.node_id]].append((interval, len(part.gpu_indices)))
                everywhere.append((interval, len(part.gpu_indices)))
    for index, node in nodes:
        if on_node[index]:
            model.add_cumulative([i for i, _ in on_node[index]], [g for _, g in on_node[index]], node.gpus)
    model.add_cumulative([i for i, _ in everywhere], [g for _, g in everywhere], sum(node.gpus for _, node in nodes))
    model.minimize(end)
    solver: Any = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.symmetry_level = 0
    solver.parameters.linearization_level = 0
    solver.parameters.random_seed = seed % (1 << 31)
    solver.parameters.max_time_in_seconds = budget_s
    gone = Steps()
    status = solver.solve(model, gone)
    bound = max(0.0, solver.best_objective_bound) / scale
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return ExactAnswer(None, bound, 0)
    order = sorted(range(len(starts)), key=lambda row: (solver.value(starts[row]), row))
    node_of = [next(index for index, here in row if solver.value(here)) for row in chosen]
    solution = known.settled([(row, node_of[row]) for row in order], "CP-SAT")
    if solution.makespan_s >= known.makespan_s:
        return ExactAnswer(None, bound, 0)
    return ExactAnswer(solution, bound, gone.count)
