"""Why a task waits, in a stable word for programs and a sentence for the people who own it."""

from __future__ import annotations

from itertools import islice

from alto_placement.planner import Explanation, WaitReason
from alto_placement.state import NodeRow, NodeState, TaskRow
from alto_placement.watches import PlanView

MOST_NAMED = 4

_SENTENCES = {
    WaitReason.STARTS_NOW: "It is about to start.",
    WaitReason.JOINS_EXECUTOR: "It is about to share the executor of another task over the same base model.",
    WaitReason.HELD_BACK: "An attempt failed; it is tried again in a moment.",
    WaitReason.GPUS_BUSY: "Every place that could hold it is in use.",
    WaitReason.FRAGMENTED: "Enough GPUs are free, but not together on one node.",
    WaitReason.TURN_OF_OTHERS: "What is free is for tasks ahead of it.",
    WaitReason.RESERVED: "What is free is reserved.",
}
# Why a task waits for places of others, which a node that rests might have saved it.
_FOR_OTHERS = (WaitReason.GPUS_BUSY, WaitReason.FRAGMENTED, WaitReason.TURN_OF_OTHERS, WaitReason.RESERVED)
_STATES = {
    NodeState.RESTING: "rests for a moment, because an attempt failed there at its start",
    NodeState.CORDONED: "takes no more work",
    NodeState.DRAINING: "is being drained",
    NodeState.LEAVING: "is being stopped",
    NodeState.LEFT: "has been stopped",
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
    if reason in _FOR_OTHERS:
        resting = (node for node in view.resting if _could_hold(node, task))
        sentence += "".join(f" {node.node_id} {_STATES[node.state]}." for node in islice(resting, MOST_NAMED))
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


def _could_hold(node: NodeRow, task: TaskRow) -> bool:
    """Whether a node that had nothing to do could take the task."""
    spec = node.spec
    if spec.gpus < task.gpus or task.gpu_kind not in ("", spec.gpu_kind):
        return False
    return not spec.memory_bytes_per_gpu or spec.memory_bytes_per_gpu >= task.size.least_memory_bytes / task.gpus


def _without_node(task: TaskRow, view: PlanView) -> tuple[str, str]:
    """Say why no node can take the task now: those that could are away, or there is none."""
    kind = f" of the kind {task.gpu_kind!r}" if task.gpu_kind else ""
    fitting = [node for node in view.state.nodes.values() if _could_hold(node, task)]
    if not fitting:
        most = max(
            (n.spec.gpus for n in view.state.nodes.values() if task.gpu_kind in ("", n.spec.gpu_kind)), default=0
        )
        asked = f"{task.gpus} {'GPU' if task.gpus == 1 else 'GPUs'}{kind}"
        return (
            WaitReason.NEVER_FITS.value.upper(),
            f"It asks for {asked} on one node; the most that a node has is {most}.",
        )
    named = fitting[:MOST_NAMED]
    why = "; ".join(f"{node.node_id} {words}" for node in named if (words := _STATES.get(node.state)))
    more = f"; and {len(fitting) - MOST_NAMED} more" if len(fitting) > MOST_NAMED else ""
    return WaitReason.NO_NODE_READY.value.upper(), f"No node that could hold it takes work now: {why}{more}."
