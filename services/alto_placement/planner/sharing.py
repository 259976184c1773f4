"""Co-location: a waiting task may join a running executor over the same backbone when that pays.

An executor's throughput saturates: tasks whose shares add up to at most 1 do not slow each other; above that, all slow
down by the sum. A task joins when it then ends before it would on GPUs of its own, and what it gains outweighs what
the host and its guests lose.
"""

from __future__ import annotations

from alto_placement.planner.model import NodeState, Placement, RunningTask, Snapshot, WaitingTask

MOST_CONSIDERED = 256


def offers(snapshot: Snapshot) -> dict[str, list[RunningTask]]:
    """Return the running executors that have room for guests, by backbone."""
    hosts = [
        task
        for task in snapshot.running
        if task.free_memory_bytes > 0 and task.sharing is not None and task.backbone and not task.guest_of
    ]
    found: dict[str, list[RunningTask]] = {}
    if hosts:
        ready = {node.node_id for node in snapshot.nodes if node.state is NodeState.READY}
        for host in hosts:
            if all(part.node_id in ready for part in host.parts):
                found.setdefault(host.backbone, []).append(host)
    return found


def joins(snapshot: Snapshot, alone_end_s: dict[int, float]) -> dict[int, Placement]:
    """Return which waiting tasks (by index) join which executors now, given when each would end without.

    At most one task joins each executor in one plan: the next plan sees its effect.
    """
    open_offers = offers(snapshot)
    load = _loads(snapshot)
    kinds = {node.node_id: node.gpu_kind for node in snapshot.nodes}
    chosen: dict[int, Placement] = {}
    for index, end_alone in sorted(alone_end_s.items(), key=lambda row: (row[1], row[0])):
        task = snapshot.waiting[index]
        best: tuple[float, RunningTask, int, float] | None = None
        for host in open_offers.get(task.backbone, ()):
            for number, choice in enumerate(task.choices):
                if choice.gpus != sum(len(part.gpu_indices) for part in host.parts):
                    continue
                if choice.gpu_kind and any(kinds[part.node_id] != choice.gpu_kind for part in host.parts):
                    continue
                end, gain = _weigh(snapshot.now_s, task, choice.duration.expected_s, host, load, end_alone)
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, host, number, end)
        if best is not None:
            _, host, number, end = best
            chosen[index] = Placement(task.task_id, number, host.parts, snapshot.now_s, end, host.task_id)
            open_offers[task.backbone].remove(host)
    return chosen


def candidates(snapshot: Snapshot) -> list[int]:
    """Return the waiting tasks (by index) that could join an executor now; the first 256."""
    open_offers = offers(snapshot)
    if not open_offers:
        return []
    found: list[int] = []
    for index, task in enumerate(snapshot.waiting):
        if task.sharing is None or task.backbone not in open_offers or task.not_before_s > snapshot.now_s:
            continue
        if any(task.sharing.memory_bytes <= host.free_memory_bytes for host in open_offers[task.backbone]):
            found.append(index)
            if len(found) >= MOST_CONSIDERED:
                break
    return found


def _loads(snapshot: Snapshot) -> dict[str, tuple[float, int]]:
    """Return the summed throughput share of each executor and how many tasks it trains."""
    load: dict[str, tuple[float, int]] = {}
    for task in snapshot.running:
        share, count = load.get(task.guest_of or task.task_id, (0.0, 0))
        load[task.guest_of or task.task_id] = (
            share + (task.sharing.throughput_share if task.sharing else 1.0),
            count + 1,
        )
    return load


def _weigh(
    now_s: float,
    task: WaitingTask,
    alone_s: float,
    host: RunningTask,
    load: dict[str, tuple[float, int]],
    end_alone_s: float,
) -> tuple[float, float]:
    """Return the end of `task` in the host's executor, and the seconds of completion time gained over all tasks."""
    if task.sharing is None or task.sharing.memory_bytes > host.free_memory_bytes:
        return end_alone_s, 0.0
    share, tasks = load[host.task_id]
    slowdown_before = max(1.0, share)
    slowdown = max(1.0, share + task.sharing.throughput_share)
    end = now_s + alone_s * slowdown
    left = max(0.0, host.expected_end_s - now_s)
    delay = min(left, end - now_s) * (slowdown / slowdown_before - 1.0)
    return end, (end_alone_s - end) - delay * tasks
