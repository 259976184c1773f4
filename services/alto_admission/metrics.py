"""What Prometheus may read of admission: docs/monitoring.md lists it."""

from __future__ import annotations

from collections.abc import Iterable

from alto.v1 import event_pb2, tuning_pb2
from alto_common.monitoring import Monitoring, gauge, gauges
from prometheus_client import Counter
from prometheus_client.metrics_core import Metric

from alto_admission.domain.task_states import QUEUED, TERMINAL, state_name
from alto_admission.store.outbox import Outbox
from alto_admission.store.tasks import TaskStore

_TRIAL_ENDS = {
    tuning_pb2.TRIAL_STATE_SUCCEEDED: "succeeded",
    tuning_pb2.TRIAL_STATE_STOPPED: "stopped",
    tuning_pb2.TRIAL_STATE_FAILED: "failed",
    tuning_pb2.TRIAL_STATE_CANCELLED: "cancelled",
}


class SearchCounts:
    """Counts tasks and trials as their ends are kept, and what policies decided."""

    def __init__(self, monitoring: Monitoring) -> None:
        registry = monitoring.registry
        self._tasks = Counter("alto_tasks_ended", "Tasks that ended, by state", ["state"], registry=registry)
        self._trials = Counter("alto_trials_ended", "Trials that ended, by state", ["state"], registry=registry)
        self._stops = Counter("alto_stop_decisions", "Decisions to stop a trial", ["policy", "rule"], registry=registry)

    def take(self, events: Iterable[event_pb2.TaskEvent]) -> None:
        """Count what these events tell; each event is to come once."""
        for event in events:
            match event.WhichOneof("payload"):
                case "task_state_changed" if event.task_state_changed.state in TERMINAL:
                    self._tasks.labels(state_name(event.task_state_changed.state).lower()).inc()
                case "trial_state_changed" if event.trial_state_changed.state in _TRIAL_ENDS:
                    self._trials.labels(_TRIAL_ENDS[event.trial_state_changed.state]).inc()
                case "trial_decided" if event.trial_decided.decision.verdict == tuning_pb2.VERDICT_STOP:
                    self._stops.labels(event.trial_decided.decision.policy, event.trial_decided.decision.rule).inc()


async def queue_metrics(tasks: TaskStore, outbox: Outbox, now_us: int) -> list[Metric]:
    """Return the unfinished tasks of all tenants, the age of the oldest that is queued, and what is yet to be told."""
    counts = await tasks.count_by_state()
    oldest_us = min((oldest for state, _, oldest in counts if state == QUEUED), default=now_us)
    return [
        gauges(
            "alto_tasks",
            "Tasks that have not ended, by state",
            ("state",),
            (((state_name(state).lower(),), count) for state, count, _ in counts),
        ),
        gauge("alto_oldest_queued_seconds", "Age of the oldest task that is queued", (now_us - oldest_us) / 1e6),
        gauge("alto_outbox_deliveries", "What placement is yet to be told", await outbox.size()),
    ]
