"""Which reports count: those of the highest epoch, each once, in order.

A lease is no mutual exclusion: a node that lost its lease may go on for a while and report. Every report carries the
epoch of its assignment, and a lower one than the highest seen is refused (Jepsen on etcd 3.4 shows why).
"""

from __future__ import annotations

from alto.v1 import error_pb2
from alto_common.errors import DomainError, invalid_fields
from alto_common.violations import Violation

from alto_admission.domain.task import Task


def admit(task: Task, epoch: int, sequence: int) -> bool:
    """Return whether event `sequence` of `epoch` is new, and take note of it.

    Raises EPOCH_STALE when the assignment has been superseded, INVALID_FIELD when events before this one are missing.
    """
    if epoch < task.epoch:
        raise DomainError(
            error_pb2.ERROR_REASON_EPOCH_STALE,
            f"epoch {epoch} of task {task.task_id} was superseded by epoch {task.epoch}: stop this assignment",
            metadata={"epoch": str(task.epoch)},
        )
    if epoch > task.epoch:
        task.epoch, task.reported_sequence = epoch, 0
    if sequence <= task.reported_sequence:
        return False
    if sequence > task.reported_sequence + 1:
        raise invalid_fields([Violation("sequence", sequence, f"report event {task.reported_sequence + 1} first")])
    task.reported_sequence = sequence
    return True
