"""Why a task waits, in a stable word for programs and a sentence for the people who own it."""

from __future__ import annotations

from alto_placement.planner import Explanation, WaitReason
from alto_placement.state import NodeRow, NodeState, TaskRow
from alto_placement.watches import PlanView

_SENTENCES = {
    WaitReason.STARTS_NOW: "It is about to start.",
    WaitReason.JOINS_EXECUTOR: "It is about to share the executor of another task over the same base model.",
    WaitReason.HELD_BACK: "An attempt failed; it is tried again in a moment.",
    WaitReason.GPUS_BUSY: "Every place that could hold it is in use.",
    WaitReason.FRAGMENTED: "Enough GPUs are free, but not together on one node.",
    WaitReason.TURN_OF_OTHERS: "What is free is for tasks ahead of it.",
    WaitReason.RESERVED: "What is free is reserved.",
}
_STATES = {
    NodeState.CORDONED: "takes no more work",
    NodeState.DRAINING: "is being drained",
    NodeState.LOST: "has not been heard of lately",
}


def queue_words(task: TaskRow, explanation: Explanation | None, view: PlanView) -> tuple[str, str]:
    """Return the word and the sentence for a waiting task."""
    if not view.state.nodes:
        return "NO_NODE_READY", "No node has joined yet."
    if explanation is None:
        return "PLANNING", "The plan that places it is being made."
    reason = explanation.reason
    if reason in (WaitReason.NO_NODE_READY, WaitReason.NEVER_FITS):
        return _without_node(task, view)
    sentence = _quota_words(task, view) if reason is WaitReason.QUOTA else _SENTENCES[reason]
    if reason is WaitReason.JOINS_EXECUTOR:
        sentence = _joining_words(task, explanation.shares_with[0], view)
    if reason is WaitReason.HELD_BACK and task.failure is not None:
        sentence = f"Attempt {task.attempts} failed ({task.failure.message}); it is tried again in a moment."
    if explanation.ahead and reason is not WaitReason.STARTS_NOW:
        sentence += f" {explanation.ahead} {'task is' if explanation.ahead == 1 else 'tasks are'} ahead of it."
    return reason.value.upper(), sentence


def _joining_words(task: TaskRow, host_task_id: str, view: PlanView) -> str:
    """Say whose executor the task is about to share; tasks of other tenants have no name."""
    host = view.state.tasks.get(host_task_id)
    if host is None or host.tenant != task.tenant:
        return _SENTENCES[WaitReason.JOINS_EXECUTOR]
    return f"It is about to share {host_task_id}'s executor: both are over the same base model."


def _quota_words(task: TaskRow, view: PlanView) -> str:
    """Say how much the task's tenant holds of what it may hold."""
    state = view.state
    held = sum(
        len(row.gpu_indices) for row in state.assignments.values() if state.tasks[row.task_id].tenant == task.tenant
    )
    row = next((row for row in view.facts.tenants if row.tenant == task.tenant), None)
    if row is None or row.quota_gpus is None:
        return f"{task.tenant} holds all the GPUs that it may hold."
    sentence = f"{task.tenant} holds {held} {'GPU' if held == 1 else 'GPUs'} and may hold {row.quota_gpus}"
    if row.cohort:
        borrowed = "as many as others" if row.borrow_gpus is None else f"{row.borrow_gpus} more where others"
        sentence += f", and borrow {borrowed} of {row.cohort} leave free"
    return f"{sentence}."


def _state_words(node: NodeRow) -> str:
    if node.rests and node.state is NodeState.READY:
        return "rests for a moment, because an attempt failed there at its start"
    return _STATES.get(node.state, "")


def _without_node(task: TaskRow, view: PlanView) -> tuple[str, str]:
    """Say why no node can take the task now: those that could are away, or there is none."""
    kind = f" of the kind {task.gpu_kind!r}" if task.gpu_kind else ""
    least_bytes = task.size.least_memory_bytes / task.gpus
    fitting = [
        node
        for node in view.state.nodes.values()
        if node.spec.gpus >= task.gpus
        and (not task.gpu_kind or node.spec.gpu_kind == task.gpu_kind)
        and (not node.spec.memory_bytes_per_gpu or node.spec.memory_bytes_per_gpu >= least_bytes)
    ]
    if not fitting:
        most = max(
            (n.spec.gpus for n in view.state.nodes.values() if task.gpu_kind in ("", n.spec.gpu_kind)), default=0
        )
        asked = f"{task.gpus} {'GPU' if task.gpus == 1 else 'GPUs'}{kind}"
        return (
            WaitReason.NEVER_FITS.value.upper(),
            f"It asks for {asked} on one node; the most that a node has is {most}.",
        )
    why = "; ".join(f"{node.node_id} {words}" for node in fitting[:4] if (words := _state_words(node)))
    more = f"; and {len(fitting) - 4} more" if len(fitting) > 4 else ""
    return WaitReason.NO_NODE_READY.value.upper(), f"No node that could hold it takes work now: {why}{more}."
