"""Whether a task could ever run here, however busy the cluster is; if not, why not and what would."""

from __future__ import annotations

from collections.abc import Sequence

from alto.v1 import error_pb2
from alto_common.errors import DomainError
from alto_common.violations import Violation

from alto_placement import planner

GIB = 2**30


def check_placeable(task: planner.WaitingTask, nodes: Sequence[planner.Node]) -> None:
    """Raise TASK_UNPLACEABLE when no node that is known could ever hold the task.

    A node that is lost, cordoned or drained now may come back and counts. Before any node has joined, every task may
    wait. The error's metadata has `largest_fit_gpus`.
    """
    if not nodes:
        return
    known = [planner.Node(node.node_id, node.gpu_kind, node.gpus, memory_bytes=node.memory_bytes) for node in nodes]
    try:
        planner.check_can_ever_fit(task, known)
    except planner.TaskNeverFitsError as error:
        field, value, sentence = _why(task, known)
        raise DomainError(
            error_pb2.ERROR_REASON_TASK_UNPLACEABLE,
            f"no node here can ever hold the task: {sentence}",
            violations=[Violation(field, value, sentence)],
            metadata={"largest_fit_gpus": str(error.largest_fit_gpus)},
        ) from error


def _why(task: planner.WaitingTask, nodes: Sequence[planner.Node]) -> tuple[str, object, str]:
    """Return the field at fault, its value, and a sentence with the cure."""
    asked = min(task.choices, key=lambda choice: choice.gpus)
    kinds = {choice.gpu_kind for choice in task.choices if choice.gpu_kind}
    of_kind = [node for node in nodes if not kinds or node.gpu_kind in kinds]
    if not of_kind:
        widest = {
            kind: max(n.gpus for n in nodes if n.gpu_kind == kind) for kind in sorted({n.gpu_kind for n in nodes})
        }
        here = ", ".join(f"{kind} (up to {gpus} on one node)" for kind, gpus in widest.items())
        kind = ", ".join(sorted(kinds))
        return "resources.gpu_kind", kind, f"no node has GPUs of the kind {kind!r}; there are: {here}"
    roomy = [node for node in of_kind if not node.memory_bytes or node.memory_bytes >= asked.memory_bytes]
    if not roomy:
        most = max(node.memory_bytes for node in of_kind)
        return (
            "base_model",
            task.backbone,
            f"it takes at least {asked.memory_bytes / GIB:.1f} GiB on each GPU and the most that one here has is "
            f"{most / GIB:.1f} GiB; take a smaller base model or more GPUs",
        )
    most_gpus = max(node.gpus for node in roomy)
    which = f" of the kind {asked.gpu_kind!r}" if asked.gpu_kind else ""
    sentence = f"it asks for {asked.gpus} GPUs{which} on one node and the most that a node has is {most_gpus}"
    return "resources.gpus", asked.gpus, f"{sentence}; ask for {most_gpus} or fewer"
