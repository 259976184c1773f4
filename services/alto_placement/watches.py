"""Watching the plan: each watcher sees the latest plan, and each task that ended exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from alto_placement.planner import Duration, Explanation, Plan, Snapshot, Tenant
from alto_placement.state import AssignmentRow, ClusterState, Moment, TaskRow


@dataclass(frozen=True)
class PlanFacts:
    """What the latest plan says, by task. Times are Unix seconds; `makespan_s` counts from when the plan was made.

    `ends` says when each task ends, as a duration from Unix time 0: expectation, upper bound, interval.
    """

    explanations: Mapping[str, Explanation] = field(default_factory=dict)
    places: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    ends: Mapping[str, Duration] = field(default_factory=dict)
    tenants: Sequence[Tenant] = ()
    makespan_s: float = 0.0
    lower_bound_s: float = 0.0


def facts_of(plan: Plan, snapshot: Snapshot, left: Mapping[str, Duration]) -> PlanFacts:
    """Return what a plan over a snapshot says; `left` is what is left of each running task."""
    choices = {task.task_id: task.choices for task in snapshot.waiting}
    ends = {task_id: _after(snapshot.now_s, duration) for task_id, duration in left.items()}
    for placement in plan.placements:
        duration = choices[placement.task_id][placement.choice].duration
        # In another's executor it may take longer than alone.
        slower = (placement.end_s - placement.start_s) / duration.expected_s if placement.host_task_id else 1.0
        ends[placement.task_id] = _after(placement.start_s, duration, slower)
    return PlanFacts(
        explanations=plan.explanations,
        places={p.task_id: (p.parts[0].node_id, p.parts[0].gpu_indices) for p in plan.placements},
        ends=ends,
        tenants=snapshot.tenants,
        makespan_s=plan.makespan_s,
        lower_bound_s=plan.lower_bound_s,
    )


def _after(start_s: float, duration: Duration, slower: float = 1.0) -> Duration:
    return Duration(
        start_s + duration.expected_s * slower,
        start_s + duration.upper_s * slower,
        start_s + duration.low_s * slower,
        start_s + duration.high_s * slower,
    )


@dataclass(frozen=True)
class PlanView:
    """The cluster and the plan at one moment. Tasks of `state` that ended are part of it only when in `ended`."""

    revision: int
    moment: Moment
    state: ClusterState
    facts: PlanFacts
    ended: tuple[TaskRow, ...] = ()

    @cached_property
    def guests(self) -> dict[str, list[AssignmentRow]]:
        """The guests of each assignment that has any."""
        return self.state.guests()


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
