"""A list scheduler: tasks in order, each where and when it can start first."""

from __future__ import annotations

from alto_placement.planner.fitting import matches
from alto_placement.planner.model import Node, NodeState, Part, Placement, Snapshot, WaitingTask


def free_times(snapshot: Snapshot) -> dict[str, list[float]]:
    """Return, for each node that takes work, when each of its GPUs becomes free."""
    now = snapshot.now_s
    free = {n.node_id: [now] * n.gpus for n in snapshot.nodes if n.state is NodeState.READY}
    for task in snapshot.running:
        for part in task.parts:
            for gpu in part.gpu_indices if part.node_id in free else ():
                free[part.node_id][gpu] = max(free[part.node_id][gpu], task.expected_end_s, now + 1e-3)
    for kept in snapshot.reservations:
        for gpu in kept.part.gpu_indices if kept.part.node_id in free else ():
            free[kept.part.node_id][gpu] = max(free[kept.part.node_id][gpu], kept.end_s)
    return free


def place(task: WaitingTask, nodes: dict[str, Node], free: dict[str, list[float]], now_s: float) -> Placement | None:
    """Place one task where it ends first and mark its GPUs taken; None when no choice fits."""
    best: Placement | None = None
    for index, choice in enumerate(task.choices):
        fitting = {node_id: times for node_id, times in free.items() if matches(choice, nodes[node_id])}
        parts = _earliest_parts(choice.gpus, choice.one_node, fitting)
        if parts is None:
            continue
        taken = [free[part.node_id][gpu] for part in parts for gpu in part.gpu_indices]
        start = max(now_s, task.not_before_s, *taken)
        end = start + choice.duration.expected_s
        if best is None or end < best.end_s:
            best = Placement(task.task_id, index, parts, start, end)
    for part in best.parts if best else ():
        for gpu in part.gpu_indices:
            free[part.node_id][gpu] = best.end_s if best else 0.0
    return best


def _earliest_parts(gpus: int, one_node: bool, free: dict[str, list[float]]) -> tuple[Part, ...] | None:
    widest = max((len(times) for times in free.values()), default=0)
    if gpus > sum(len(times) for times in free.values()) or (one_node and gpus > widest):
        return None
    left, parts = gpus, list[Part]()
    remaining = dict(free)
    while left:
        width = min(left, max(len(times) for times in remaining.values()))
        holders = {n: sorted(range(len(t)), key=t.__getitem__) for n, t in remaining.items() if len(t) >= width}
        node_id = min(holders, key=lambda n: (free[n][holders[n][width - 1]], len(free[n]), n))
        parts.append(Part(node_id, tuple(sorted(holders[node_id][:width]))))
        del remaining[node_id]
        left -= width
    return tuple(parts)
