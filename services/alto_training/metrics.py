"""What Prometheus may read of a node: docs/monitoring.md lists it."""

from __future__ import annotations

from alto.v1 import event_pb2
from alto_common.monitoring import gauge, gauges
from prometheus_client.metrics_core import Metric

from alto_training.assignments import Assignments, Held


def node_metrics(assignments: Assignments, places: int, now_s: float) -> list[Metric]:
    """Return what the node trains and how fast; `now_s` is of the clock of `assignments`."""
    running = [held for held in assignments.held.values() if held.ending is None]
    used = sum(len(held.gpu_indices) for held in running)
    lease_s = 0.0 if assignments.lease_end_s is None else max(0.0, assignments.lease_end_s - now_s)
    measured = {held.task_id: _measured(held) for held in running}
    return [
        gauges("alto_node_places", "Places of this node", ("use",), _uses(used, places)),
        gauge("alto_node_lease_seconds", "Left of the lease from placement; 0 without one", lease_s),
        gauges(
            "alto_task_tokens_per_second",
            "Speed of training, evaluations left out",
            ("task_id",),
            (((held.task_id,), held.progress.tokens_per_second) for held in running),
        ),
        gauges(
            "alto_task_fraction_done",
            "How far a task is, of what early exits have left",
            ("task_id",),
            (((held.task_id,), held.progress.fraction_done) for held in running),
        ),
        gauges(
            "alto_task_tick_seconds",
            "Mean time of a training tick since the task began on this node",
            ("task_id",),
            (((name,), work.training_seconds / work.ticks) for name, work in measured.items() if work.ticks),
        ),
    ]


def _uses(used: int, places: int) -> list[tuple[tuple[str], float]]:
    return [(("used",), used), (("free",), places - used)]


def _measured(held: Held) -> event_pb2.MeasuredWork:
    return event_pb2.MeasuredWork.FromString(held.progress.measured)
