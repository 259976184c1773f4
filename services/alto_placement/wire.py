"""Placement's rows to and from protobuf."""

from __future__ import annotations

from collections.abc import Iterator

from alto.v1 import placement_pb2, placement_service_pb2, tuning_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from alto_placement import planner
from alto_placement.durations import Measured
from alto_placement.explanations import queue_words
from alto_placement.lifecycle import Reported
from alto_placement.links import LeaseRenewal, Order, StartOrder, StopOrder
from alto_placement.state import (
    AssignmentRow,
    FailureCause,
    NodeRow,
    NodeSpec,
    NodeState,
    Outcome,
    Progress,
    StopReason,
    TaskRow,
    TaskState,
    WorkSize,
)
from alto_placement.watches import PlanView

# What a message in a list takes beside its own bytes, at most: its field's number and its length.
HEADER_BYTES = 6

NODE_STATES = {
    NodeState.READY: placement_pb2.NODE_STATE_READY,
    NodeState.RESTING: placement_pb2.NODE_STATE_RESTING,
    NodeState.CORDONED: placement_pb2.NODE_STATE_CORDONED,
    NodeState.DRAINING: placement_pb2.NODE_STATE_DRAINING,
    NodeState.LEAVING: placement_pb2.NODE_STATE_LEAVING,
    NodeState.LEFT: placement_pb2.NODE_STATE_LEFT,
    NodeState.LOST: placement_pb2.NODE_STATE_LOST,
}
TASK_STATES = {
    TaskState.WAITING: placement_pb2.PLACEMENT_STATE_WAITING,
    TaskState.ASSIGNED: placement_pb2.PLACEMENT_STATE_ASSIGNED,
    TaskState.STOPPING: placement_pb2.PLACEMENT_STATE_STOPPING,
    TaskState.HELD: placement_pb2.PLACEMENT_STATE_HELD,
    TaskState.FINISHED: placement_pb2.PLACEMENT_STATE_FINISHED,
    TaskState.GIVEN_UP: placement_pb2.PLACEMENT_STATE_GIVEN_UP,
}
STOP_REASONS = {
    StopReason.CANCELLED: placement_pb2.STOP_REASON_CANCELLED,
    StopReason.PAUSED: placement_pb2.STOP_REASON_PAUSED,
    StopReason.DRAINED: placement_pb2.STOP_REASON_DRAINED,
    StopReason.PREEMPTED: placement_pb2.STOP_REASON_PREEMPTED,
    StopReason.SUPERSEDED: placement_pb2.STOP_REASON_SUPERSEDED,
}
CHANGES = {
    planner.ChangeKind.TASKS_END: tuning_pb2.FORECAST_CHANGE_KIND_TASKS_END,
    planner.ChangeKind.FEWER_GPUS: tuning_pb2.FORECAST_CHANGE_KIND_FEWER_GPUS,
    planner.ChangeKind.MORE_GPUS: tuning_pb2.FORECAST_CHANGE_KIND_MORE_GPUS,
    planner.ChangeKind.MORE_QUOTA: tuning_pb2.FORECAST_CHANGE_KIND_MORE_QUOTA,
    planner.ChangeKind.HIGHER_PRIORITY: tuning_pb2.FORECAST_CHANGE_KIND_HIGHER_PRIORITY,
    planner.ChangeKind.NODE_READY: tuning_pb2.FORECAST_CHANGE_KIND_NODE_READY,
    planner.ChangeKind.TIME: tuning_pb2.FORECAST_CHANGE_KIND_TIME,
}
OUTCOMES: dict[int, Outcome] = {
    placement_pb2.ASSIGNMENT_OUTCOME_COMPLETED: Outcome.COMPLETED,
    placement_pb2.ASSIGNMENT_OUTCOME_STOPPED: Outcome.STOPPED,
    placement_pb2.ASSIGNMENT_OUTCOME_FAILED_RETRIABLE: Outcome.FAILED_RETRIABLE,
    placement_pb2.ASSIGNMENT_OUTCOME_FAILED: Outcome.FAILED,
    placement_pb2.ASSIGNMENT_OUTCOME_UNSHARED: Outcome.UNSHARED,
}

# What the messages can hold: the year 9999, and about as many years.
LAST_TIMESTAMP_S = 253_402_300_799.0
LONGEST_DURATION_S = 315_576_000_000.0


def duration(seconds: float) -> Duration:
    """Return a duration message; never negative."""
    message = Duration()
    message.FromMilliseconds(int(min(max(0.0, seconds), LONGEST_DURATION_S) * 1000))
    return message


def timestamp(wall_s: float) -> Timestamp:
    """Return a timestamp message; what lies beyond the last that there is becomes that one."""
    message = Timestamp()
    message.FromMilliseconds(int(min(wall_s, LAST_TIMESTAMP_S) * 1000))
    return message


def size_from_wire(message: placement_service_pb2.WorkSize) -> WorkSize:
    """Return the size of a task's work; a share left out is 1."""
    return WorkSize(
        train_tokens=message.train_tokens,
        evaluation_tokens=message.evaluation_tokens,
        steps=message.steps,
        total_lora_rank=message.total_lora_rank,
        base_parameters=message.base_parameters,
        expected_share=message.expected_share if 0 < message.expected_share <= 1 else 1.0,
        trials=message.trials,
        longest_steps=message.longest_steps,
        shape=message.shape,
        least_memory_bytes=message.least_memory_bytes,
        adapter_memory_bytes=message.adapter_memory_bytes,
    )


def gpus_from_wire(resources: tuning_pb2.Resources) -> int:
    """Return how many GPUs are asked for; 1 when left out."""
    return resources.gpus if resources.HasField("gpus") else 1


def task_from_wire(request: placement_service_pb2.EnqueueTaskRequest, enqueued_s: float) -> TaskRow:
    """Return the task of an EnqueueTask request."""
    return TaskRow(
        task_id=request.work.task_id,
        tenant=request.tenant,
        work=request.work.SerializeToString(),
        base_model=request.work.base_model,
        gpus=gpus_from_wire(request.resources),
        gpu_kind=request.resources.gpu_kind,
        size=size_from_wire(request.size),
        enqueued_s=enqueued_s,
        priority=request.priority,
    )


def asked_from_wire(request: placement_service_pb2.EstimateTaskRequest, now_s: float) -> TaskRow:
    """Return the task that an EstimateTask request asks about."""
    return TaskRow(
        task_id="",
        tenant=request.tenant,
        work=b"",
        base_model=request.base_model,
        gpus=gpus_from_wire(request.resources),
        gpu_kind=request.resources.gpu_kind,
        size=size_from_wire(request.size),
        enqueued_s=now_s,
    )


def spec_from_wire(message: placement_pb2.Node) -> NodeSpec:
    """Return what a node says of itself."""
    return NodeSpec(
        node_id=message.node_id,
        gpu_kind=message.gpu_kind,
        gpus=message.gpus,
        memory_bytes_per_gpu=message.memory_bytes_per_gpu,
        address=message.address,
        version=message.version,
    )


def reported_from_wire(message: placement_service_pb2.AssignmentStatus, heard_s: float) -> Reported:
    """Return what a heartbeat says of one assignment."""
    measured = message.measured
    progress = Progress(
        fraction_done=min(1.0, max(0.0, message.fraction_done)),
        heard_s=heard_s,
        measured=Measured(
            ticks=measured.ticks,
            train_tokens=measured.train_tokens,
            lora_rank_ticks=measured.lora_rank_ticks,
            training_s=measured.training_seconds,
            evaluation_tokens=measured.evaluation_tokens,
            evaluation_s=measured.evaluation_seconds,
            checkpoints=measured.checkpoints,
            checkpoint_s=measured.checkpoint_seconds,
        ),
        share_trained=min(1.0, max(0.0, measured.share_trained)),
        longest_steps_left=measured.longest_steps_left,
        guest_memory_bytes=message.guest_memory_bytes,
    )
    return Reported(message.assignment_id, message.epoch, progress)


def failure_from_wire(message: placement_service_pb2.AssignmentEnded) -> FailureCause | None:
    """Return why an assignment failed, None when it did not."""
    if not message.HasField("failure"):
        return None
    return FailureCause(message.failure.reason, message.failure.message)


def failure_to_wire(cause: FailureCause | None) -> tuning_pb2.Failure | None:
    """Return the message of a failure."""
    return tuning_pb2.Failure(reason=cause.reason, message=cause.message) if cause is not None else None


def node_to_wire(node: NodeRow, view: PlanView) -> placement_pb2.Node:
    """Return the message of a node."""
    spec, state = node.spec, view.state
    message = placement_pb2.Node(
        node_id=spec.node_id,
        gpu_kind=spec.gpu_kind,
        gpus=spec.gpus,
        memory_bytes_per_gpu=spec.memory_bytes_per_gpu,
        address=spec.address,
        version=spec.version,
        state=NODE_STATES[node.state],
        gpus_in_use=spec.gpus - len(state.free_gpus(spec.node_id)),
        last_seen_time=timestamp(state.last_seen_s.get(spec.node_id, node.last_seen_s)),
    )
    rest = state.rests.get(spec.node_id)
    if rest is not None and node.state is NodeState.RESTING:
        message.rest.failures, message.rest.message = rest.failures, rest.why
        message.rest.until_time.CopyFrom(timestamp(view.moment.wall_s + rest.until_s - view.moment.monotonic_s))
    return message


def order_to_wire(order: Order, lease_s: float) -> placement_service_pb2.NodeSessionResponse:
    """Return the message of what a node is told."""
    wire = placement_service_pb2
    if isinstance(order, LeaseRenewal):
        return wire.NodeSessionResponse(lease_renewed=wire.LeaseRenewed(lease_duration=duration(lease_s)))
    if isinstance(order, StartOrder):
        assignment = placement_pb2.Assignment(
            assignment_id=order.assignment.assignment_id,
            epoch=order.assignment.epoch,
            gpu_indices=order.assignment.gpu_indices,
            work=placement_pb2.TuningWork.FromString(order.task.work),
            stopped_trial_ids=order.task.stopped_trial_ids,
            host_assignment_id=order.assignment.host_assignment_id,
        )
        return wire.NodeSessionResponse(assignment=assignment)
    if isinstance(order, StopOrder):
        stop = wire.AssignmentStop(assignment_id=order.assignment_id, reason=STOP_REASONS[order.reason])
        return wire.NodeSessionResponse(assignment_stop=stop)
    stops = wire.TrialsStop(assignment_id=order.assignment_id, trial_ids=order.trial_ids)
    return wire.NodeSessionResponse(trials_stop=stops)


def estimate_to_wire(predicted: planner.Duration) -> placement_pb2.DurationEstimate:
    """Return the message of a predicted duration."""
    return placement_pb2.DurationEstimate(expected=duration(predicted.expected_s), upper=duration(predicted.upper_s))


def task_to_wire(task: TaskRow, view: PlanView) -> placement_pb2.PlannedTask:
    """Return the message of a task in the plan."""
    state = view.state
    where = task.ended or state.task_state(task)
    message = placement_pb2.PlannedTask(
        task_id=task.task_id,
        tenant=task.tenant,
        state=TASK_STATES[where],
        epoch=task.epoch,
        attempts=task.attempts,
        failure=failure_to_wire(task.failure) if where is TaskState.GIVEN_UP else None,
    )
    if where in (TaskState.ASSIGNED, TaskState.STOPPING):
        row = state.assignments[task.assignment_id]
        message.node_id = row.node_id
        message.gpu_indices.extend(row.gpu_indices)
        message.start_time.CopyFrom(timestamp(row.started_s))
        end = view.facts.ends.get(task.task_id)
        message.end_time.CopyFrom(timestamp(end.expected_s if end is not None else view.moment.wall_s))
        if end is not None:
            message.forecast.CopyFrom(_forecast(end))
            _add_sharing(message.forecast, row, view)
    elif where is TaskState.WAITING:
        _add_queue(message, task, view)
    elif task.ended_s is not None:
        message.end_time.CopyFrom(timestamp(task.ended_s))
    return message


def _add_queue(message: placement_pb2.PlannedTask, task: TaskRow, view: PlanView) -> None:
    explanation = view.facts.explanations.get(task.task_id)
    reason, sentence = queue_words(task, explanation, view)
    queue = tuning_pb2.QueueStatus(reason=reason, explanation=sentence)
    end = view.facts.ends.get(task.task_id)
    if explanation is not None:
        message.forecast.CopyFrom(_waiting_forecast(explanation, end))
        if explanation.predicted_start_s is not None and end is not None:
            for start_time in (queue.predicted_start_time, message.start_time):
                start_time.CopyFrom(timestamp(explanation.predicted_start_s))
            for end_time in (queue.predicted_end_time, message.end_time):
                end_time.CopyFrom(timestamp(end.expected_s))
            place = view.facts.places.get(task.task_id)
            if place is not None:
                message.node_id = place.parts[0].node_id
                message.gpu_indices.extend(place.parts[0].gpu_indices)
    message.queue.CopyFrom(queue)


def _forecast(end: planner.Duration) -> tuning_pb2.TaskForecast:
    return tuning_pb2.TaskForecast(
        end_time=timestamp(end.expected_s),
        earliest_end_time=timestamp(end.low_s),
        latest_end_time=timestamp(end.high_s),
        longest_end_time=timestamp(end.upper_s),
    )


def _add_sharing(message: tuning_pb2.TaskForecast, row: AssignmentRow, view: PlanView) -> None:
    message.is_guest = bool(row.host_assignment_id)
    host = view.state.assignments.get(row.host_assignment_id)
    message.host_task_id = host.task_id if host is not None else ""
    message.guest_task_ids.extend(guest.task_id for guest in view.guests.get(row.assignment_id, ()))


def _waiting_forecast(explanation: planner.Explanation, end: planner.Duration | None) -> tuning_pb2.TaskForecast:
    placed = explanation.predicted_start_s is not None and end is not None
    message = _forecast(end) if placed and end is not None else tuning_pb2.TaskForecast()
    if explanation.predicted_start_s is not None:
        message.start_time.CopyFrom(timestamp(explanation.predicted_start_s))
    if explanation.deadline_s is not None:
        message.first_in_line_time.CopyFrom(timestamp(explanation.deadline_s))
    message.waits_for.extend(explanation.waits_for)
    message.ahead = explanation.ahead
    if explanation.shares_with:
        message.is_guest, message.host_task_id = True, explanation.shares_with[0]
    for change in explanation.changes:
        message.changes.add(kind=CHANGES[change.kind], amount=change.amount)
    return message


def plan_to_wire(view: PlanView) -> placement_pb2.Plan:
    """Return the message of the plan."""
    tasks = [task for task in view.state.tasks.values() if task.ended is None]
    return placement_pb2.Plan(
        revision=view.revision,
        time=timestamp(view.moment.wall_s),
        tasks=[task_to_wire(task, view) for task in (*tasks, *view.ended)],
        nodes=[node_to_wire(node, view) for node in view.state.nodes.values()],
        makespan=duration(view.facts.makespan_s),
        makespan_lower_bound=duration(view.facts.lower_bound_s),
    )


def plan_parts(plan: placement_pb2.Plan, most_bytes: int) -> Iterator[placement_pb2.Plan]:
    """Yield a plan in parts of at most `most_bytes`: nodes, then tasks; whatever else it has is in the first."""
    if plan.ByteSize() <= most_bytes:
        yield plan
        return
    part = placement_pb2.Plan(
        revision=plan.revision,
        time=plan.time,
        makespan=plan.makespan,
        makespan_lower_bound=plan.makespan_lower_bound,
    )
    part_bytes = part.ByteSize()
    for name in ("nodes", "tasks"):
        for one in getattr(plan, name):
            one_bytes = one.ByteSize() + HEADER_BYTES
            if part_bytes + one_bytes > most_bytes:
                yield part
                part = placement_pb2.Plan(revision=plan.revision)
                part_bytes = part.ByteSize()
            getattr(part, name).append(one)
            part_bytes += one_bytes
    yield part
