"""Watching the plan: each watcher sees the latest plan, and each task that ended exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from alto_placement.planner import Duration, Explanation, Placement, Plan, Snapshot, Tenant, WaitingTask
from alto_placement.state import AssignmentRow, ClusterState, Moment, NodeRow, NodeState, TaskRow


@dataclass(frozen=True)
class PlanFacts:
    """What the latest plan says, by task; of tasks that wait it is read from the plan when it is asked for.

    Times are Unix seconds; `makespan_s` counts from when the plan was made. `ends` says when each task ends, as a
    duration from Unix time 0: expectation, upper bound, interval.
    """

    explanations: Mapping[str, Explanation] = field(default_factory=dict)
    places: Mapping[str, Placement] = field(default_factory=dict)
    ends: Mapping[str, Duration] = field(default_factory=dict)
    tenants: Sequence[Tenant] = ()
    makespan_s: float = 0.0
    lower_bound_s: float = 0.0


def facts_of(plan: Plan, snapshot: Snapshot, ends: Mapping[str, Duration]) -> PlanFacts:
    """Return what a plan over a snapshot says; `ends` are those of the tasks that have a place."""
    return PlanFacts(
        explanations=plan.explanations,
        places=plan.places,
        ends=_Ends(plan, snapshot, ends),
        tenants=snapshot.tenants,
        makespan_s=plan.makespan_s,
        lower_bound_s=plan.lower_bound_s,
    )


class _Ends(Mapping[str, Duration]):
    """When each task ends: those that have a place, and those that the plan gives one."""

    def __init__(self, plan: Plan, snapshot: Snapshot, running: Mapping[str, Duration]) -> None:
        self._places = plan.places
        self._snapshot = snapshot
        self._running = running

    @cached_property
    def _waiting(self) -> dict[str, WaitingTask]:
        return {task.task_id: task for task in self._snapshot.waiting}

    def __getitem__(self, task_id: str) -> Duration:
        known = self._running.get(task_id)
        if known is not None:
            return known
        placement = self._places[task_id]
        duration = self._waiting[task_id].choices[placement.choice].duration
        # In another's executor it may take longer than alone.
        slower = (placement.end_s - placement.start_s) / duration.expected_s if placement.host_task_id else 1.0
        return _after(placement.start_s, duration, slower)

    def __iter__(self) -> Iterator[str]:
        yield from self._running
        yield from self._places

    def __len__(self) -> int:
        return len(self._running) + len(self._places)


def _after(start_s: float, duration: Duration, slower: float) -> Duration:
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

    @cached_property
    def resting(self) -> tuple[NodeRow, ...]:
        """The nodes that rest."""
        return tuple(node for node in self.state.nodes.values() if node.state is NodeState.RESTING)


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
