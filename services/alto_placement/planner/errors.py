"""What can be wrong with a snapshot. Each error names the row at fault; the caller keeps its last good plan."""

from __future__ import annotations

import alto_planner


class SnapshotError(ValueError):
    """A snapshot contradicts itself. `subject` is the id of the row at fault."""

    def __init__(self, subject: str, message: str) -> None:
        super().__init__(f"{subject}: {message}")
        self.subject = subject


class DuplicateRowError(SnapshotError):
    """The same id appears twice."""


class UnknownNodeError(SnapshotError):
    """A running task or a reservation names a node, or a GPU of a node, that is not in the snapshot."""


class InvalidRowError(SnapshotError):
    """A value is outside its range: no GPUs, a negative or infinite duration, more than 64 GPUs on a node."""


class GpuConflictError(SnapshotError):
    """Two running tasks hold the same GPU."""


class ReservationConflictError(SnapshotError):
    """Two reservations keep the same GPU at the same time."""


class TaskNeverFitsError(SnapshotError):
    """No node of the cluster can ever hold the task. `largest_fit_gpus` is the widest choice that would fit."""

    def __init__(self, subject: str, message: str, largest_fit_gpus: int) -> None:
        super().__init__(subject, message)
        self.largest_fit_gpus = largest_fit_gpus


_BY_KIND: dict[str, type[SnapshotError]] = {
    "duplicate": DuplicateRowError,
    "gpu_conflict": GpuConflictError,
    "invalid": InvalidRowError,
    "reservation_conflict": ReservationConflictError,
    "unknown_node": UnknownNodeError,
}


def snapshot_error(error: alto_planner.ReadError) -> SnapshotError:
    """Return what the compiled core found wrong with a snapshot as the error of its kind."""
    kind, subject, message = error.args
    return _BY_KIND[kind](subject, message)
