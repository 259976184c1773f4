"""From snapshot to plan."""

from __future__ import annotations

import time
from collections.abc import Callable

from alto_placement.planner.lists import free_times, place
from alto_placement.planner.model import Explanation, Plan, Snapshot, WaitReason


def plan(
    snapshot: Snapshot, *, budget_s: float = 0.0, seed: int = 0, clock: Callable[[], float] = time.monotonic
) -> Plan:
    """Return a feasible plan for `snapshot` within `budget_s` seconds of `clock` beyond the fast lists.

    Raises SnapshotError for a snapshot that contradicts itself. The same snapshot and seed give the same plan when
    `budget_s` is 0.
    """
    began = clock()
    free = free_times(snapshot)
    nodes = {node.node_id: node for node in snapshot.nodes}
    order = sorted(
        snapshot.waiting,
        key=lambda t: (-t.priority, min(c.gpus * c.duration.expected_s for c in t.choices), t.arrived_s, t.task_id),
    )
    placed = [(task, place(task, nodes, free, snapshot.now_s)) for task in order]
    placements = tuple(p for _, p in placed if p is not None)
    now = snapshot.now_s
    end = max([now, *(p.end_s for p in placements), *(t.expected_end_s for t in snapshot.running)])
    explanations = {
        p.task_id: Explanation(
            WaitReason.STARTS_NOW if p.start_s <= now else WaitReason.GPUS_BUSY,
            predicted_start_s=p.start_s,
            predicted_end_s=p.end_s,
        )
        for p in placements
    }
    return Plan(
        epoch=snapshot.epoch,
        now_s=now,
        placements=placements,
        starting=tuple(p for p in placements if p.start_s <= now),
        preemptions=(),
        unplaced=tuple(task.task_id for task, p in placed if p is None),
        makespan_s=end - now,
        lower_bound_s=0.0,
        mean_completion_s=sum(p.end_s - now for p in placements) / max(1, len(placements)),
        mean_completion_bound_s=0.0,
        explanations=explanations,
        source="smallest area first",
        planning_s=clock() - began,
    )
