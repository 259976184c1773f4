"""Which nodes can hold which choice, whatever is running there now."""

from __future__ import annotations

from collections.abc import Iterable

from alto_placement.planner.errors import TaskNeverFitsError
from alto_placement.planner.model import Choice, Node, NodeState, WaitingTask


def matches(choice: Choice, node: Node) -> bool:
    """Return whether `node` is of the kind and memory that `choice` asks for."""
    if choice.gpu_kind and choice.gpu_kind != node.gpu_kind:
        return False
    return not (choice.memory_bytes and node.memory_bytes and choice.memory_bytes > node.memory_bytes)


def widest_fit(choice: Choice, nodes: Iterable[Node]) -> int:
    """Return the most GPUs that a choice like this could ever have on `nodes`, on one node or across them."""
    widths = [node.gpus for node in nodes if node.state is not NodeState.LOST and matches(choice, node)]
    if not widths:
        return 0
    return max(widths) if choice.one_node else sum(widths)


def check_can_ever_fit(task: WaitingTask, nodes: Iterable[Node]) -> None:
    """Raise TaskNeverFitsError when no choice of `task` fits an otherwise empty cluster. Call it at admission."""
    known = tuple(nodes)
    widest = max((widest_fit(choice, known) for choice in task.choices), default=0)
    if not any(choice.gpus <= widest_fit(choice, known) for choice in task.choices):
        kinds = sorted({choice.gpu_kind or "any kind" for choice in task.choices})
        asked = min((choice.gpus for choice in task.choices), default=0)
        message = f"asks for at least {asked} GPUs of {', '.join(kinds)}; the most that fits is {widest}"
        raise TaskNeverFitsError(task.task_id, message, widest)
