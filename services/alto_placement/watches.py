"""Watching the plan: each watcher sees the latest plan, and each task that ended exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from alto_placement.planner import Explanation, Plan, Snapshot
from alto_placement.state import ClusterState, Moment, TaskRow


@dataclass(frozen=True)
class PlanFacts:
    """What the latest plan says, by task. Times are Unix seconds; `makespan_s` counts from when the plan was made."""

    explanations: Mapping[str, Explanation] = field(default_factory=dict)
    places: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    expected_end_s: Mapping[str, float] = field(default_factory=dict)
    makespan_s: float = 0.0
    lower_bound_s: float = 0.0


def facts_of(plan: Plan, snapshot: Snapshot) -> PlanFacts:
    """Return what a plan over a snapshot says."""
    ends = {task.task_id: task.expected_end_s for task in snapshot.running}
    return PlanFacts(
        explanations=plan.explanations,
        places={p.task_id: (p.parts[0].node_id, p.parts[0].gpu_indices) for p in plan.placements},
        expected_end_s={**ends, **{p.task_id: p.end_s for p in plan.placements}},
        makespan_s=plan.makespan_s,
        lower_bound_s=plan.lower_bound_s,
    )


@dataclass(frozen=True)
class PlanView:
    """The cluster and the plan at one moment. Tasks of `state` that ended are part of it only when in `ended`."""

    revision: int
    moment: Moment
    state: ClusterState
    facts: PlanFacts
    ended: tuple[TaskRow, ...] = ()


@dataclass(eq=False)
class PlanWatch:
    """One watcher. A slow one skips plans, never a task's end: those wait here."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: dict[str, TaskRow] = field(default_factory=dict)

    def announce(self, ended: Iterable[TaskRow]) -> None:
        """Note that there is a new plan."""
        self.ended.update((task.task_id, task) for task in ended)
        self.changed.set()

    def take_ended(self) -> tuple[TaskRow, ...]:
        """Return the tasks that ended since the last call."""
        taken = tuple(self.ended.values())
        self.ended.clear()
        return taken
