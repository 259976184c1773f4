"""Why a task waits, in a stable word for programs and a sentence for the people who own it."""

from __future__ import annotations

from alto_placement.planner import Explanation, WaitReason
from alto_placement.state import TaskRow
from alto_placement.watches import PlanView

_SENTENCES = {
    WaitReason.STARTS_NOW: "It is about to start.",
    WaitReason.JOINS_EXECUTOR: "It is about to join an executor over the same base model.",
    WaitReason.HELD_BACK: "An attempt failed; it is tried again in a moment.",
    WaitReason.GPUS_BUSY: "Every place that could hold it is in use.",
    WaitReason.FRAGMENTED: "Enough GPUs are free, but not together on one node.",
    WaitReason.TURN_OF_OTHERS: "What is free is for tasks ahead of it.",
    WaitReason.RESERVED: "What is free is reserved.",
    WaitReason.QUOTA: "Its tenant already holds all the GPUs that it may hold.",
    WaitReason.NO_NODE_READY: "No node that could hold it takes work now.",
    WaitReason.NEVER_FITS: "No node of this cluster can hold it.",
}


def queue_words(task: TaskRow, explanation: Explanation | None, view: PlanView) -> tuple[str, str]:
    """Return the word and the sentence for a waiting task."""
    if not view.state.nodes:
        return "NO_NODE_READY", "No node has joined yet."
    if explanation is None:
        return "PLANNING", "The plan that places it is being made."
    sentence = _SENTENCES[explanation.reason]
    if explanation.reason is WaitReason.HELD_BACK and task.failure is not None:
        sentence = f"Attempt {task.attempts} failed ({task.failure.message}); it is tried again in a moment."
    if explanation.ahead:
        sentence += f" {explanation.ahead} {'task is' if explanation.ahead == 1 else 'tasks are'} ahead of it."
    if explanation.largest_fit_gpus is not None:
        sentence += f" The most that fits is {explanation.largest_fit_gpus} GPUs."
    return explanation.reason.value.upper(), sentence
