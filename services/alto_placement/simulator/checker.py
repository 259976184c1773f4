"""An independent judge of plans: shares no code with the planner, only its data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

from alto_placement.planner.model import NodeState, Part, Plan, Snapshot

TOLERANCE_S = 1e-6


def violations(snapshot: Snapshot, plan: Plan) -> list[str]:
    """Return what is wrong with `plan`; an empty list for a feasible plan whose figures are right."""
    tasks = {task.task_id: task for task in snapshot.waiting}
    nodes = {node.node_id: node for node in snapshot.nodes}
    hosts = {row.task_id: row for row in snapshot.running if row.sharing and not row.guest_of}
    held: dict[tuple[str, int], list[tuple[float, float, str]]] = defaultdict(list)  # per GPU: from, until, by whom
    for row in snapshot.running:
        for gpu in _gpus(row.parts if not row.guest_of else ()):
            held[gpu].append((float("-inf"), row.expected_end_s, row.task_id))
    free_s = {gpu: max(end for _, end, _ in rows) for gpu, rows in held.items()}
    for kept in snapshot.reservations:
        for gpu in _gpus([kept.part]):  # what runs already is not disturbed by a reservation
            held[gpu].append((max(kept.start_s, free_s.get(gpu, kept.start_s)), kept.end_s, kept.reservation_id))
    broken: list[str] = []
    for place in plan.placements:
        task = tasks[place.task_id]
        choice, gpus = task.choices[place.choice], _gpus(place.parts)
        rules = {"starts too early": place.start_s >= max(snapshot.now_s, task.not_before_s) - TOLERANCE_S}
        if place.host_task_id:
            host, asked = hosts.get(place.host_task_id), task.sharing
            same = host is not None and (host.backbone, host.parts) == (task.backbone, place.parts)
            rules["joins what is no host for it"] = same and asked is not None
            rules["has no memory at its host"] = bool(host and asked and asked.memory_bytes <= host.free_memory_bytes)
        else:
            seconds, on = place.end_s - place.start_s, [(nodes[node_id], gpu) for node_id, gpu in gpus]
            exact = len(gpus) == len(set(gpus)) == choice.gpus and not (choice.one_node and len(place.parts) > 1)
            ready = all(node.state is NodeState.READY and 0 <= gpu < node.gpus for node, gpu in on)
            kind = all(choice.gpu_kind in ("", node.gpu_kind) for node, _ in on)
            roomy = all(not node.memory_bytes or node.memory_bytes >= choice.memory_bytes for node, _ in on)
            rules["has not the GPUs it asked for"] = exact
            rules["is on what takes no work"] = ready
            rules["is on the wrong kind of node"] = kind and roomy
            rules["does not last as its choice says"] = abs(seconds - choice.duration.expected_s) <= TOLERANCE_S
            for gpu in gpus:
                held[gpu].append((place.start_s, place.end_s, place.task_id))
        broken += [f"{place.task_id} {words}" for words, kept_to in rules.items() if not kept_to]
    for gpu, rows in held.items():
        for (_, end, one), (start, _, other) in pairwise(sorted(rows)):
            if start < end - TOLERANCE_S:
                broken.append(f"{one} and {other} both hold {gpu}")
    if sorted([*(place.task_id for place in plan.placements), *plan.unplaced]) != sorted(tasks):
        broken.append("some task is neither placed once nor reported once as unplaced")
    ends = [snapshot.now_s, *(row.expected_end_s for row in snapshot.running), *(p.end_s for p in plan.placements)]
    if not plan.lower_bound_s - TOLERANCE_S <= plan.makespan_s >= max(ends) - snapshot.now_s - TOLERANCE_S:
        broken.append("the makespan or its bound is wrong")
    return broken


def _gpus(parts: Iterable[Part]) -> list[tuple[str, int]]:
    return [(part.node_id, gpu) for part in parts for gpu in part.gpu_indices]
