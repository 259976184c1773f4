"""From snapshot to plan."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import alto_planner

from alto_placement.planner import exact
from alto_placement.planner.answers import Explanations, Placements, PlacesByTask
from alto_placement.planner.errors import snapshot_error
from alto_placement.planner.explaining import Explainer
from alto_placement.planner.model import Placement, Plan, Snapshot
from alto_placement.planner.preempting import preemptions
from alto_placement.planner.sharing import candidates, joins

# CP-SAT improves plan and bound of small instances; above this size it finds nothing in the time of a plan. Where
# packing applies that is the better search, and CP-SAT is left less time and fewer tasks.
EXACT_TASKS, EXACT_TASKS_PACKED = 50, 24
EXACT_SHARE, EXACT_SHARE_PACKED = 0.7, 0.3  # of the budget
LEAST_EXACT_BUDGET_S = 0.5
WORTH_PROVING = 1e-4


class Memory:
    """Rows read for the last plan. Giving it to the next `plan` saves reading them again and changes nothing else.

    Not for use from two threads at once.
    """

    def __init__(self) -> None:
        self.reader = alto_planner.Reader()


def plan(
    snapshot: Snapshot,
    *,
    budget_s: float = 0.0,
    seed: int = 0,
    memory: Memory | None = None,
    effort: Sequence[int] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Return a feasible plan for `snapshot`: the best of the fast lists, improved for about `budget_s` seconds.

    Without a budget the plan depends on the snapshot alone (and, where something is drawn, on `seed`). With a budget it
    depends on the speed of the machine too; `effort` of such a plan, given back with the same snapshot and seed,
    repeats its placements exactly, whatever the time that takes. Raises SnapshotError when the snapshot contradicts
    itself.
    """
    began = clock()
    if effort is not None and effort[0] < 0:
        budget_s = 0.0  # that plan was made without a search
    reader = (memory or Memory()).reader
    rounds = tuple(effort[:3]) if effort is not None else (-1, -1, -1)
    exact_steps = effort[3] if effort is not None else None
    read = _read(reader, snapshot)
    joined = _join(snapshot, read, seed)
    remaining = snapshot
    if joined:
        # What joins an executor needs no GPUs of its own: the others are planned without it.
        rest = [task for task in snapshot.waiting if task.task_id not in joined]
        remaining = dataclasses.replace(snapshot, waiting=rest)
        read = _read(reader, remaining)
    packs = all(task.choices[0].gpus.bit_count() == 1 for task in remaining.waiting[: EXACT_TASKS + 1])
    most_tasks, share = (EXACT_TASKS_PACKED, EXACT_SHARE_PACKED) if packs else (EXACT_TASKS, EXACT_SHARE)
    small = budget_s >= LEAST_EXACT_BUDGET_S and exact.applicable(remaining, read, most_tasks)
    if exact_steps is not None:
        small = exact_steps > 0
    exact_s = budget_s * share if small else 0.0
    solution = alto_planner.solve(read, budget_s - exact_s, seed, rounds)
    bound, steps = solution.makespan_bound_s, 0
    if small and solution.makespan_s > bound * (1 + WORTH_PROVING):
        solution, bound, steps = _exact(remaining, solution, exact_s, seed, exact_steps)
    placements = Placements(remaining, solution, tuple(joined.values()))
    return _answer(snapshot, remaining, read, solution, placements, joined, bound, (steps,), clock, began)


def _exact(
    snapshot: Snapshot, known: alto_planner.Solution, budget_s: float, seed: int, steps: int | None
) -> tuple[alto_planner.Solution, float, int]:
    """Return the better of `known` and CP-SAT's plan by the objective, a bound, and the steps if the plan is CP-SAT's.

    `steps` of an earlier call find the same plan again, whatever the time that takes.
    """
    found = exact.improve(snapshot, known, budget_s if steps is None else float("inf"), seed, steps or 0)
    bound = max(known.makespan_bound_s, found.lower_bound_s)
    if found.solution is None or found.solution.value >= known.value:
        return known, bound, 0
    return found.solution, bound, found.steps


def _read(reader: alto_planner.Reader, snapshot: Snapshot) -> alto_planner.ReadSnapshot:
    try:
        return reader.read(snapshot)
    except alto_planner.ReadError as error:
        raise snapshot_error(error) from None


def _join(snapshot: Snapshot, read: alto_planner.ReadSnapshot, seed: int) -> dict[str, Placement]:
    """Return who joins whose executor, weighed against the fast plan, so that it does not depend on the search."""
    could = candidates(snapshot)
    if not could:
        return {}
    fast = alto_planner.solve(read, 0.0, seed)
    alone: dict[int, float] = {}
    for index in could:
        placed = fast.placement(index)
        alone[index] = placed[3] if placed else float("inf")
    return {placement.task_id: placement for placement in joins(snapshot, alone).values()}


def _answer(
    snapshot: Snapshot,
    remaining: Snapshot,
    read: alto_planner.ReadSnapshot,
    solution: alto_planner.Solution,
    placements: Placements,
    joined: dict[str, Placement],
    bound_s: float,
    exact_effort: tuple[int, ...],
    clock: Callable[[], float],
    began: float,
) -> Plan:
    explainer = Explainer(remaining, read, solution, placements)
    joining = {
        task.task_id: explainer.explain_join(task, joined[task.task_id])
        for task in (snapshot.waiting if joined else ())
        if task.task_id in joined
    }
    explanations = Explanations(placements, explainer.explain, joining)
    latest_join = max((placement.end_s - snapshot.now_s for placement in joined.values()), default=0.0)
    return Plan(
        epoch=snapshot.epoch,
        now_s=snapshot.now_s,
        placements=placements,
        places=PlacesByTask(placements),
        starting=placements.starting(),
        preemptions=preemptions(remaining, placements, read.highest_priority),
        unplaced=tuple(remaining.waiting[index].task_id for index in solution.unplaced()),
        makespan_s=max(solution.makespan_s, latest_join),
        lower_bound_s=min(bound_s, solution.makespan_s),
        mean_completion_s=solution.mean_completion_s,
        mean_completion_bound_s=solution.mean_completion_bound_s,
        explanations=explanations,
        source=solution.source,
        effort=solution.effort + exact_effort,
        planning_s=clock() - began,
    )
