"""An independent judge of plans: shares no code with the planner, only its data."""

from __future__ import annotations

import itertools

from alto_placement.planner.model import NodeState, Plan, Snapshot

TOLERANCE_S = 1e-6


def violations(snapshot: Snapshot, plan: Plan) -> list[str]:
    """Return what is wrong with `plan`; an empty list for a feasible plan whose figures are right."""
    found: list[str] = []
    nodes = {node.node_id: node for node in snapshot.nodes}
    tasks = {task.task_id: task for task in snapshot.waiting}
    hosts = {task.task_id: task for task in snapshot.running if task.sharing and not task.guest_of}
    busy: dict[tuple[str, int], list[tuple[float, float, str]]] = {}
    for running in snapshot.running:
        for part in running.parts if not running.guest_of else ():
            for gpu in part.gpu_indices:
                busy.setdefault((part.node_id, gpu), []).append(
                    (float("-inf"), running.expected_end_s, running.task_id)
                )
    last = max((task.expected_end_s for task in snapshot.running), default=snapshot.now_s)
    for kept in snapshot.reservations:
        for gpu in kept.part.gpu_indices:
            taken = busy.setdefault((kept.part.node_id, gpu), [])
            # What already runs is not disturbed by a reservation.
            taken.append((max([kept.start_s, *(end for _, end, _ in taken)]), kept.end_s, kept.reservation_id))
    placed: set[str] = set()
    for place in plan.placements:
        task = tasks[place.task_id]
        choice = task.choices[place.choice]
        last = max(last, place.end_s)
        if place.task_id in placed:
            found.append(f"{place.task_id} is placed twice")
        placed.add(place.task_id)
        if place.start_s < max(snapshot.now_s, task.not_before_s) - TOLERANCE_S:
            found.append(f"{place.task_id} starts too early")
        if place.host_task_id:
            host = hosts.get(place.host_task_id)
            if host is None or (host.backbone, host.parts) != (task.backbone, place.parts) or not task.sharing:
                found.append(f"{place.task_id} joins {place.host_task_id}, which is no host for it")
            elif task.sharing.memory_bytes > host.free_memory_bytes:
                found.append(f"{place.task_id} has no memory left in the executor of {place.host_task_id}")
            continue
        if abs(place.end_s - place.start_s - choice.duration.expected_s) > TOLERANCE_S:
            found.append(f"{place.task_id} does not last as long as its choice says")
        gpus = [(part.node_id, gpu) for part in place.parts for gpu in part.gpu_indices]
        if len(gpus) != choice.gpus or len(set(gpus)) != choice.gpus or (choice.one_node and len(place.parts) > 1):
            found.append(f"{place.task_id} has not the GPUs it asked for")
        for node_id, gpu in gpus:
            node = nodes[node_id]
            if node.state is not NodeState.READY or not 0 <= gpu < node.gpus:
                found.append(f"{place.task_id} is placed on {node_id}/{gpu}, which takes no work")
            if choice.gpu_kind not in ("", node.gpu_kind) or 0 < node.memory_bytes < choice.memory_bytes:
                found.append(f"{place.task_id} is placed on {node_id}, which is of the wrong kind")
            busy.setdefault((node_id, gpu), []).append((place.start_s, place.end_s, place.task_id))
    for key, intervals in busy.items():
        intervals.sort()
        for (_, end, one), (start, _, other) in itertools.pairwise(intervals):
            if start < end - TOLERANCE_S:
                found.append(f"{one} and {other} both hold {key}")
    if placed & set(plan.unplaced) or placed | set(plan.unplaced) != set(tasks):
        found.append("some task is neither placed nor reported as unplaced")
    if plan.makespan_s < last - snapshot.now_s - TOLERANCE_S or plan.lower_bound_s > plan.makespan_s + TOLERANCE_S:
        found.append("the makespan or its bound is wrong")
    return found
