"""Watching the plan: each watcher sees the latest plan, and each task that ended exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from alto_placement.planner import Explanation
from alto_placement.state import ClusterState, Moment, TaskRow


@dataclass(frozen=True)
class PlanView:
    """The plan at one moment: the cluster, what the planner said of it, and the tasks that ended since the last view.

    `makespan_s` counts from `moment`. Tasks of `state` that ended are not part of the view unless in `ended`.
    """

    revision: int
    moment: Moment
    state: ClusterState
    explanations: dict[str, Explanation]
    planned_nodes: dict[str, tuple[str, tuple[int, ...]]]
    expected_end_s: dict[str, float]
    makespan_s: float
    lower_bound_s: float
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
