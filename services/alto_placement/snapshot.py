"""What the planner is shown of the cluster. Times are Unix seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from alto_placement import planner
from alto_placement.forecasts import Forecasts
from alto_placement.policy import Policy
from alto_placement.sharing import SharingView
from alto_placement.state import AssignmentRow, ClusterState, Moment, NodeRow, NodeState, TaskRow, TaskState

# An executor that is asked to stop writes a checkpoint at its next tick.
CHECKPOINT_WITHIN_S = 30.0
# A task that overstays its prediction is expected to end any moment, never in the past.
OVERSTAY_S = 1.0
# What was asked to stop writes a checkpoint and ends.
STOPS_WITHIN_S = 5.0

_NODE_STATES = {
    NodeState.READY: planner.NodeState.READY,
    NodeState.CORDONED: planner.NodeState.CORDONED,
    NodeState.DRAINING: planner.NodeState.DRAINING,
    NodeState.LOST: planner.NodeState.LOST,
}


def snapshot_of(
    state: ClusterState,
    forecasts: Forecasts,
    policy: Policy,
    usage_gpu_s: Mapping[str, float],
    now: Moment,
    epoch: int,
) -> tuple[planner.Snapshot, dict[str, planner.Duration]]:
    """Return the planner's view of the cluster at this moment, and what is left of each task that has a place.

    `usage_gpu_s` is each tenant's decayed usage.
    """
    running = []
    left: dict[str, planner.Duration] = {}
    waiting = []
    sharing = SharingView(state, forecasts, policy.sharing)
    kinds_here = kinds_of(state)
    for task in state.tasks.values():
        where = state.task_state(task)
        if where in (TaskState.ASSIGNED, TaskState.STOPPING):
            row = state.assignments[task.assignment_id]
            kind = state.nodes[row.node_id].spec.gpu_kind
            progress, slowdown = state.progress.get(row.assignment_id), sharing.slowdowns.get(row.assignment_id, 1.0)
            left[task.task_id] = _left(forecasts.remaining(task, row, kind, progress, now, slowdown))
            host = state.assignments.get(row.host_assignment_id) if row.host_assignment_id else row
            # A guest whose host has ended holds nothing: it is about to wait again.
            if host is not None:
                shown = _running(task, row, host, left[task.task_id], now)
                running.append(sharing.running(shown, task, row, kind, left[task.task_id].expected_s))
        elif where is TaskState.WAITING:
            delay_s = max(0.0, state.retry_at_s.get(task.task_id, now.monotonic_s) - now.monotonic_s)
            kinds = kinds_for(task, kinds_here)
            asked = waiting_task(task, kinds, state, forecasts, now.wall_s, delay_s)
            waiting.append(sharing.waiting(asked, task, kinds))
    snapshot = planner.Snapshot(
        now_s=now.wall_s,
        nodes=[planner_node(node) for node in state.nodes.values()],
        waiting=waiting,
        running=running,
        reservations=[one for one in policy.reservations if _is_here(one, state) and one.end_s > now.wall_s],
        tenants=_tenants(policy, usage_gpu_s, {task.tenant for task in state.tasks.values() if task.ended is None}),
        objective=policy.objective,
        epoch=epoch,
    )
    return snapshot, left


def planner_node(node: NodeRow) -> planner.Node:
    """Return a node as the planner sees it."""
    spec = node.spec
    return planner.Node(spec.node_id, spec.gpu_kind, spec.gpus, _NODE_STATES[node.state], spec.memory_bytes_per_gpu)


def waiting_task(
    task: TaskRow, kinds: Sequence[str], state: ClusterState, forecasts: Forecasts, now_s: float, delay_s: float = 0.0
) -> planner.WaitingTask:
    """Return a queued task as the planner sees it: rigid, on one node, a choice for each of these kinds of GPU."""
    can_resume = _can_resume(task, state)
    choices = tuple(
        planner.Choice(
            task.gpus,
            forecasts.rest(task, kind, can_resume),
            kind,
            memory_bytes=-(-task.size.least_memory_bytes // task.gpus),
            one_node=True,
        )
        for kind in kinds
    )
    return planner.WaitingTask(
        task_id=task.task_id,
        tenant=task.tenant,
        choices=choices,
        # A clock that was ahead when the task came must not make it wait for the present to catch up.
        arrived_s=min(task.enqueued_s, now_s),
        priority=task.priority,
        backbone=task.base_model,
        not_before_s=now_s + delay_s,
        begun=task.keeps_turn,
    )


def kinds_of(state: ClusterState) -> list[str]:
    """Return the kinds of GPU that there are, GPUs before CPUs."""
    return sorted({node.spec.gpu_kind for node in state.nodes.values()}, key=lambda kind: (kind == "cpu", kind)) or [""]


def kinds_for(task: TaskRow, kinds_here: list[str]) -> list[str]:
    """Return the kinds of GPU that a task may run on: those that there are, its own alone if it asks for one."""
    return [task.gpu_kind] if task.gpu_kind else kinds_here


def _can_resume(task: TaskRow, state: ClusterState) -> bool:
    """Return whether the node that has the task's checkpoint takes work: another one begins anew."""
    node = state.nodes.get(task.ran_on)
    return node is not None and node.state is NodeState.READY


def _is_here(reservation: planner.Reservation, state: ClusterState) -> bool:
    node = state.nodes.get(reservation.part.node_id)
    return node is not None and max(reservation.part.gpu_indices) < node.spec.gpus


def _tenants(policy: Policy, usage_gpu_s: Mapping[str, float], present: set[str]) -> list[planner.Tenant]:
    known = {row.tenant: row for row in policy.tenants}
    rows = [known.get(tenant) or planner.Tenant(tenant) for tenant in sorted(present | known.keys())]
    return [dataclasses.replace(row, usage_gpu_s=usage_gpu_s.get(row.tenant, 0.0)) for row in rows]


def _left(left: planner.Duration) -> planner.Duration:
    expected_s = max(OVERSTAY_S, left.expected_s)
    return planner.Duration(
        expected_s, max(expected_s, left.upper_s), min(expected_s, left.low_s), max(expected_s, left.high_s)
    )


def _running(
    task: TaskRow, row: AssignmentRow, host: AssignmentRow, left: planner.Duration, now: Moment
) -> planner.RunningTask:
    stops = row.stop is not None
    expected_s = STOPS_WITHIN_S if stops else left.expected_s
    return planner.RunningTask(
        task_id=task.task_id,
        tenant=task.tenant,
        parts=(planner.Part(host.node_id, host.gpu_indices),),
        started_s=min(row.started_s, now.wall_s),
        expected_end_s=now.wall_s + expected_s,
        upper_end_s=now.wall_s + (expected_s if stops else left.upper_s),
        priority=task.priority,
        next_checkpoint_s=None if stops else now.wall_s + CHECKPOINT_WITHIN_S,
        resume=(planner.Choice(task.gpus, planner.Duration.certain(expected_s), task.gpu_kind, one_node=True),),
        backbone=task.base_model,
        guest_of=host.task_id if host is not row else "",
    )
