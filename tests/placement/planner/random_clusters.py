"""Random clusters and queues, and what every plan for them must keep. Shared by the tests and `planner_random`."""

from __future__ import annotations

import dataclasses

from alto_placement.planner import (
    Choice,
    Duration,
    Memory,
    Node,
    NodeState,
    Objective,
    Part,
    Reservation,
    RunningTask,
    Sharing,
    Snapshot,
    Tenant,
    WaitingTask,
    plan,
)
from alto_placement.simulator import violations
from hypothesis import strategies as st

KINDS = ("h100", "a100", "cpu")
TENANTS = ("ada", "bo", "cy")
NOW_S = 1000.0
seconds = st.floats(0.5, 5000.0, allow_nan=False)
choices = st.builds(
    Choice,
    gpus=st.integers(1, 20),
    duration=seconds.map(Duration.certain),
    gpu_kind=st.sampled_from(("", *KINDS)),
    memory_bytes=st.sampled_from((0, 40, 80)),
    one_node=st.booleans(),
)


def snapshots() -> st.SearchStrategy[Snapshot]:
    """Clusters with everything at once, and plain ones: those alone are packed by halves."""
    return st.one_of(snapshots_of_all_kinds(), plain_snapshots())


@st.composite
def plain_snapshots(draw: st.DrawFn) -> Snapshot:
    """Nodes of several sizes and tasks whose widths are powers of two, equal but for their sizes."""
    nodes = [
        Node(f"n{index}", draw(st.sampled_from(KINDS)), draw(st.sampled_from((1, 2, 4, 6, 8, 8, 8))))
        for index in range(draw(st.integers(1, 6)))
    ]
    taken = [(node, draw(st.integers(0, node.gpus))) for node in nodes]
    running = [
        RunningTask(f"r-{node.node_id}", "ada", (Part(node.node_id, tuple(range(gpus))),), 0.0, end, end)
        for node, gpus in taken
        if gpus and (end := NOW_S + draw(st.floats(0.0, 3000.0)))
    ]
    wanted = st.builds(
        Choice,
        gpus=st.sampled_from((1, 2, 4, 8, 16)),
        duration=seconds.map(Duration.certain),
        gpu_kind=st.sampled_from(("", *KINDS)),
        one_node=st.booleans(),
    )
    waiting = [WaitingTask(f"t{index}", "ada", (draw(wanted),), NOW_S) for index in range(draw(st.integers(0, 25)))]
    objective = Objective(makespan=draw(st.floats(0.0, 10.0)), patience=float("inf"))
    return Snapshot(NOW_S, nodes, waiting, running, objective=objective, epoch=7)


@st.composite
def snapshots_of_all_kinds(draw: st.DrawFn) -> Snapshot:
    nodes = [
        Node(
            f"n{index}",
            draw(st.sampled_from(KINDS)),
            draw(st.integers(1, 9)),
            draw(st.sampled_from((NodeState.READY, NodeState.READY, NodeState.READY, *NodeState))),
            draw(st.sampled_from((0, 40, 80))),
        )
        for index in range(draw(st.integers(0, 6)))
    ]
    running, reservations = [], []
    for node in nodes:
        split = draw(st.integers(0, node.gpus))
        if split:
            end = NOW_S + draw(st.floats(-50.0, 3000.0))
            part = Part(node.node_id, tuple(range(split)))
            checkpoint = draw(st.sampled_from((None, NOW_S + 10.0)))
            priority = draw(st.integers(0, 2))
            shares = draw(st.booleans())
            running.append(
                RunningTask(
                    f"r-{node.node_id}",
                    draw(st.sampled_from(TENANTS)),
                    (part,),
                    0.0,
                    end,
                    end,
                    priority,
                    checkpoint,
                    backbone="llama",
                    sharing=Sharing(10, draw(st.floats(0.1, 1.0))) if shares else None,
                    free_memory_bytes=draw(st.sampled_from((0, 20, 60))),
                )
            )
        if draw(st.integers(0, 3)) == 0:
            start = NOW_S + draw(st.floats(-100.0, 2000.0))
            first = draw(st.integers(0, node.gpus - 1))
            part = Part(node.node_id, tuple(range(first, node.gpus)))
            reservations.append(Reservation(f"k-{node.node_id}", part, start, start + draw(seconds)))
    waiting = [
        WaitingTask(
            f"t{index}",
            draw(st.sampled_from(TENANTS)),
            tuple(draw(st.lists(choices, min_size=1, max_size=3))),
            NOW_S - draw(st.floats(0.0, 20000.0)),
            draw(st.sampled_from((0, 0, 0, 1, 2))),
            backbone=draw(st.sampled_from(("llama", "qwen"))),
            sharing=draw(st.sampled_from((None, Sharing(30, 0.4)))),
            not_before_s=draw(st.sampled_from((float("-inf"), NOW_S + 100.0))),
        )
        for index in range(draw(st.integers(0, 25)))
    ]
    tenants = [
        Tenant(
            name,
            draw(st.floats(0.5, 4.0)),
            draw(st.floats(0.0, 1e5)),
            draw(st.one_of(st.none(), st.integers(0, 20))),
            draw(st.sampled_from(("", "lab"))),
            draw(st.one_of(st.none(), st.integers(0, 10))),
        )
        for name in draw(st.lists(st.sampled_from(TENANTS), unique=True))
    ]
    objective = Objective(
        makespan=draw(st.floats(0.0, 10.0)),
        patience=2.0,
        min_patience_s=600.0,
        fairness=draw(st.sampled_from((0.0, 0.5, 1.0))),
        longest_wait_s=draw(st.sampled_from((0.0, 500.0, float("inf")))),
    )
    return Snapshot(NOW_S, nodes, waiting, running, reservations, tenants, objective, epoch=7)


def check_feasible_and_repeatable(snapshot: Snapshot, seed: int) -> None:
    first = plan(snapshot, seed=seed)
    assert not violations(snapshot, first)
    assert first.epoch == 7
    again = plan(snapshot, seed=seed)
    assert tuple(again.placements) == tuple(first.placements)
    assert again.preemptions == first.preemptions
    for task in snapshot.waiting:
        explanation = first.explanations[task.task_id]
        assert (explanation.predicted_start_s is None) == (task.task_id in first.unplaced)


def check_search_repeated_by_its_effort(snapshot: Snapshot, seed: int) -> None:
    first = plan(snapshot, budget_s=0.003, seed=seed)
    assert not violations(snapshot, first)
    again = plan(snapshot, budget_s=0.003, seed=seed, effort=first.effort)
    assert tuple(again.placements) == tuple(first.placements)
    assert not violations(snapshot, plan(snapshot, seed=seed, effort=(2, 2, 2, 0)))


def check_memory_changes_nothing(snapshot: Snapshot, seed: int) -> None:
    """Plan, let some tasks go, some start and some come back as new rows, and plan again with and without memory."""
    memory = Memory()
    plan(snapshot, memory=memory)
    kept = [task for index, task in enumerate(snapshot.waiting) if (index * 7 + seed) % 3]
    again = [dataclasses.replace(task, arrived_s=task.arrived_s + 1.0) for task in snapshot.waiting[: seed % 3]]
    ids = {task.task_id for task in again}
    kept = [task for task in kept if task.task_id not in ids] + again
    later = dataclasses.replace(snapshot, now_s=NOW_S + 60.0, waiting=kept, running=snapshot.running[seed % 2 :])
    for shown in (later, snapshot, later):
        with_memory, without = plan(shown, memory=memory), plan(shown)
        assert tuple(with_memory.placements) == tuple(without.placements)
        assert (with_memory.makespan_s, with_memory.lower_bound_s) == (without.makespan_s, without.lower_bound_s)
        assert not violations(shown, with_memory)


def check_quotas_hold(snapshot: Snapshot, seed: int) -> None:
    answer = plan(snapshot, seed=seed)
    tenant_of = {task.task_id: task.tenant for task in snapshot.waiting}
    held = dict.fromkeys(TENANTS, 0)
    for task in snapshot.running:
        held[task.tenant] += sum(len(part.gpu_indices) for part in task.parts)
    before = dict(held)
    for place in answer.starting:
        if not place.host_task_id:
            held[tenant_of[place.task_id]] += sum(len(part.gpu_indices) for part in place.parts)
    for row in snapshot.tenants:
        if row.quota_gpus is None or held[row.tenant] == before[row.tenant]:
            continue
        borrow = 0.0 if not row.cohort else float("inf") if row.borrow_gpus is None else row.borrow_gpus
        assert held[row.tenant] <= row.quota_gpus + borrow


PROMISES = (
    check_feasible_and_repeatable,
    check_search_repeated_by_its_effort,
    check_memory_changes_nothing,
    check_quotas_hold,
)
