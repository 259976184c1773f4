"""What Prometheus may read of the cluster and the plan: docs/monitoring.md lists it."""

from __future__ import annotations

from collections import Counter

from alto_common.monitoring import gauge, gauges
from prometheus_client.metrics_core import Metric

from alto_placement.state import ClusterState, TaskState
from alto_placement.watches import PlanView


def cluster_metrics(view: PlanView) -> list[Metric]:
    """Return the nodes, their places, the tasks that have not ended, and what the plan says of them all."""
    state, facts = view.state, view.facts
    unfinished = [task for task in state.tasks.values() if task.ended is None]
    stands = [(task, state.task_state(task)) for task in unfinished]
    queued_s = [task.enqueued_s for task, where in stands if where is TaskState.WAITING]
    return [
        _counted("alto_nodes", "Nodes", Counter(node.state.value for node in state.nodes.values())),
        _counted("alto_unfinished_tasks", "Tasks that have not ended", Counter(where.value for _, where in stands)),
        gauges("alto_places", "Places of nodes that are there", ("kind", "use"), _places(state)),
        gauge(
            "alto_longest_wait_seconds",
            "Since the task that has waited longest of those that wait was queued",
            view.moment.wall_s - min(queued_s, default=view.moment.wall_s),
        ),
        gauge("alto_plan_makespan_seconds", "Until the last known task ends, by the plan", facts.makespan_s),
        gauge("alto_plan_lower_bound_seconds", "No plan could be shorter than this", facts.lower_bound_s),
    ]


def _counted(name: str, text: str, counts: Counter[str]) -> Metric:
    return gauges(name, f"{text}, by state", ("state",), (((state,), count) for state, count in counts.items()))


def _places(state: ClusterState) -> list[tuple[tuple[str, str], float]]:
    used: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    kinds = {node.node_id: node.spec.gpu_kind for node in state.nodes.values() if not node.lost}
    for node_id, kind in kinds.items():
        whole[kind] += state.nodes[node_id].spec.gpus
    for row in state.assignments.values():
        if row.node_id in kinds:
            used[kinds[row.node_id]] += len(row.gpu_indices)
    both = [(kind, {"used": used[kind], "free": count - used[kind]}) for kind, count in whole.items()]
    return [((kind, use), count) for kind, counts in both for use, count in counts.items()]
