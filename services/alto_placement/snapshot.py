"""What the planner is shown of the cluster. Times are Unix seconds."""

from __future__ import annotations

from alto_placement import planner
from alto_placement.estimates import DurationEstimator
from alto_placement.state import AssignmentRow, ClusterState, Moment, NodeRow, NodeState, TaskRow, TaskState

# An executor that is asked to stop writes a checkpoint at its next tick.
CHECKPOINT_WITHIN_S = 30.0
# A task that overstays its prediction is expected to end any moment, never in the past.
OVERSTAY_S = 5.0

_NODE_STATES = {
    NodeState.READY: planner.NodeState.READY,
    NodeState.CORDONED: planner.NodeState.CORDONED,
    NodeState.DRAINING: planner.NodeState.DRAINING,
    NodeState.LOST: planner.NodeState.LOST,
}


def snapshot_of(state: ClusterState, estimator: DurationEstimator, now: Moment, epoch: int) -> planner.Snapshot:
    """Return the planner's view of the cluster at this moment."""
    running = []
    waiting = []
    for task in state.tasks.values():
        where = state.task_state(task)
        if where in (TaskState.ASSIGNED, TaskState.STOPPING):
            running.append(_running(state, task, state.assignments[task.assignment_id], estimator, now))
        elif where is TaskState.WAITING:
            delay_s = max(0.0, state.retry_at_s.get(task.task_id, now.monotonic_s) - now.monotonic_s)
            waiting.append(waiting_task(task, fastest_kind(task, state), estimator, now.wall_s + delay_s))
    return planner.Snapshot(
        now_s=now.wall_s,
        nodes=[planner_node(node) for node in state.nodes.values()],
        waiting=waiting,
        running=running,
        epoch=epoch,
    )


def planner_node(node: NodeRow) -> planner.Node:
    """Return a node as the planner sees it."""
    spec = node.spec
    return planner.Node(spec.node_id, spec.gpu_kind, spec.gpus, _NODE_STATES[node.state], spec.memory_bytes_per_gpu)


def waiting_task(
    task: TaskRow, gpu_kind: str, estimator: DurationEstimator, not_before_s: float
) -> planner.WaitingTask:
    """Return a queued task as the planner sees it: rigid, on one node, with the work that is left."""
    duration = estimator.estimate(task.base_model, gpu_kind, task.gpus, task.size)
    left = max(0.02, 1.0 - task.fraction_done)
    duration = planner.Duration(
        duration.expected_s * left, duration.upper_s * left, duration.low_s * left, duration.high_s * left
    )
    return planner.WaitingTask(
        task_id=task.task_id,
        tenant=task.tenant,
        choices=(planner.Choice(task.gpus, duration, task.gpu_kind, one_node=True),),
        arrived_s=task.enqueued_s,
        priority=task.priority,
        backbone=task.base_model,
        not_before_s=not_before_s,
    )


def fastest_kind(task: TaskRow, state: ClusterState) -> str:
    """Return the kind of GPU to estimate a task for: the one it asks for, else one that is here, GPUs before CPUs."""
    kinds = {node.spec.gpu_kind for node in state.nodes.values()}
    return task.gpu_kind or min(kinds, key=lambda kind: (kind == "cpu", kind), default="")


def _running(
    state: ClusterState, task: TaskRow, row: AssignmentRow, estimator: DurationEstimator, now: Moment
) -> planner.RunningTask:
    kind = state.nodes[row.node_id].spec.gpu_kind
    predicted = estimator.estimate(task.base_model, kind, task.gpus, task.size)
    progress = state.progress.get(row.assignment_id)
    if row.stop is not None:
        expected_end_s = upper_end_s = now.wall_s + OVERSTAY_S
    elif progress is not None and progress.seconds_remaining is not None:
        expected_end_s = now.wall_s + max(OVERSTAY_S, progress.seconds_remaining - (now.monotonic_s - progress.heard_s))
        upper_end_s = max(expected_end_s, row.started_s + predicted.upper_s)
    else:
        expected_end_s = max(now.wall_s + OVERSTAY_S, row.started_s + predicted.expected_s)
        upper_end_s = max(expected_end_s, row.started_s + predicted.upper_s)
    left_s = expected_end_s - now.wall_s
    return planner.RunningTask(
        task_id=task.task_id,
        tenant=task.tenant,
        parts=(planner.Part(row.node_id, row.gpu_indices),),
        started_s=row.started_s,
        expected_end_s=expected_end_s,
        upper_end_s=upper_end_s,
        priority=task.priority,
        next_checkpoint_s=None if row.stop is not None else now.wall_s + CHECKPOINT_WITHIN_S,
        resume=(planner.Choice(task.gpus, planner.Duration.certain(left_s), task.gpu_kind, one_node=True),),
        backbone=task.base_model,
    )
