"""What a plan of placement means for a task. Pure: a plan in, changes of the story out.

A plan may be older than what the node has reported meanwhile. Its epoch tells: what placement says of an earlier
assignment than the one that reports is passed over.
"""

from __future__ import annotations

from collections.abc import Collection

from alto.v1 import error_pb2, placement_pb2, tuning_pb2
from alto_common.errors import reason_name

from alto_admission.domain.story import Story, is_news
from alto_admission.domain.task import Standing
from alto_admission.domain.task_states import CANCELLING, PAUSING, QUEUED, RUNNING

UNREACHABLE = tuning_pb2.QueueStatus(
    reason="PLACEMENT_UNREACHABLE",
    explanation="placement cannot be reached at the moment; the task is safe and goes on when it is back",
)


def apply(story: Story, planned: placement_pb2.PlannedTask) -> None:
    """Take over what a plan says of a task."""
    task = story.task
    if planned.epoch < task.epoch:
        return
    match planned.state:
        case placement_pb2.PLACEMENT_STATE_WAITING:
            if task.state in (RUNNING, PAUSING):
                story.released()
        case placement_pb2.PLACEMENT_STATE_HELD:
            if task.state == PAUSING:
                story.released()
        case placement_pb2.PLACEMENT_STATE_GIVEN_UP:
            story.failed(planned.failure)
    status = queue_status(planned)
    if status is not None:
        story.queued(status)


def queue_status(planned: placement_pb2.PlannedTask) -> tuning_pb2.QueueStatus | None:
    """Return why a task waits, and until when, according to a plan; None where it says nothing of that."""
    match planned.state:
        case placement_pb2.PLACEMENT_STATE_WAITING:
            return planned.queue
        case placement_pb2.PLACEMENT_STATE_ASSIGNED:
            return _starting(planned)
        case _:
            return None


def concerns(task: Standing, planned: placement_pb2.PlannedTask) -> bool:
    """Return whether `apply` may change anything: spares locking a task for every plan that comes."""
    if planned.epoch < task.epoch:
        return False
    if task.state == QUEUED and (status := queue_status(planned)) is not None:
        return is_news(task, status)
    match planned.state:
        case placement_pb2.PLACEMENT_STATE_WAITING:
            return task.state in (RUNNING, PAUSING)
        case placement_pb2.PLACEMENT_STATE_HELD:
            return task.state == PAUSING
        case placement_pb2.PLACEMENT_STATE_GIVEN_UP:
            return True
        case _:
            return False


def is_forgotten(task: Standing, planned: placement_pb2.PlannedTask | None) -> bool:
    """Return whether placement no longer works on a task that has not ended here."""
    if planned is not None and planned.state != placement_pb2.PLACEMENT_STATE_FINISHED:
        return False
    return task.state in (QUEUED, RUNNING, PAUSING, CANCELLING)


def recover(story: Story) -> None:
    """Deal with a task that placement has not known for some time, though it has heard everything.

    A cancelled one has ended: its node died before it could say so. Any other is handed over again, and the answer
    tells what became of it.
    """
    if story.task.state == CANCELLING:
        story.released()
    elif not story.task.ended:
        story.enqueue_again()


def answered(story: Story, planned: placement_pb2.PlannedTask) -> None:
    """Take over from placement's answer to handing a task over whether it has ended.

    Why it waits the plans tell, one after another: the answer may come behind a newer one.
    """
    if planned.state == placement_pb2.PLACEMENT_STATE_FINISHED and planned.epoch >= story.task.epoch:
        reason = reason_name(error_pb2.ERROR_REASON_EXECUTION_FAILED)
        message = "placement has finished with the task, but its node never reported how it ended"
        story.failed(tuning_pb2.Failure(reason=reason, message=message))
    elif planned.state == placement_pb2.PLACEMENT_STATE_GIVEN_UP:
        apply(story, planned)


def forecast(planned: placement_pb2.PlannedTask, own_task_ids: Collection[str]) -> tuning_pb2.TaskForecast:
    """Return a forecast as its tenant may see it: tasks of others have no name."""
    message = tuning_pb2.TaskForecast()
    message.CopyFrom(planned.forecast)
    own = [task_id for task_id in planned.forecast.waits_for if task_id in own_task_ids]
    message.waits_for_others = len(planned.forecast.waits_for) - len(own)
    del message.waits_for[:]
    message.waits_for.extend(own)
    if message.host_task_id not in own_task_ids:
        message.host_task_id = ""
    guests = [task_id for task_id in planned.forecast.guest_task_ids if task_id in own_task_ids]
    del message.guest_task_ids[:]
    message.guest_task_ids.extend(guests)
    return message


def _starting(planned: placement_pb2.PlannedTask) -> tuning_pb2.QueueStatus:
    loading = f"node {planned.node_id} is loading the base model and the data"
    joining = f"node {planned.node_id} is reading its data, to train it in the executor of another task"
    return tuning_pb2.QueueStatus(
        reason="STARTING",
        explanation=joining if planned.forecast.is_guest else loading,
        predicted_end_time=planned.end_time if planned.HasField("end_time") else None,
    )
