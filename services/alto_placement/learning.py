"""What placement learns while it runs, and keeps: durations from nodes' reports, and what each tenant has used."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import structlog

from alto_placement.forecasts import Forecasts
from alto_placement.lifecycle import Reported
from alto_placement.planner.fairness import accrued, decayed
from alto_placement.sharing import slowdowns
from alto_placement.state import AssignmentRow, Changes, ClusterState, Moment
from alto_placement.store import PlacementStore
from alto_placement.watches import PlanFacts

# A predicted end that moves by more than this, and this share of what is left, is worth another plan.
MOVED_S = 2.0
MOVED_SHARE = 0.1

log = structlog.get_logger("alto.placement")


class Learning:
    """Feeds the forecasts and counts usage; keeps both in the store, at most a few seconds late."""

    def __init__(self, store: PlacementStore, clock: Callable[[], Moment]) -> None:
        self.forecasts = Forecasts()
        self._store = store
        self._clock = clock
        self._usage_gpu_s: dict[str, float] = {}
        self._counted_s = clock().monotonic_s

    async def load(self) -> None:
        """Take up what the store holds."""
        records = await self._store.load_learned()
        self.forecasts.load(records)
        now_s = self._clock().wall_s
        for name, content in records.items():
            kind, *key = json.loads(name)
            if kind == "usage":
                self._usage_gpu_s[key[0]] = decayed(content["gpu_s"], now_s - content["at_s"])

    async def keep(self, interval_s: float) -> None:
        """Save every `interval_s`, for ever."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.save()
            except Exception:
                log.exception("what was learned could not be kept; trying again")

    async def save(self) -> None:
        """Keep what is new."""
        at_s = self._clock().wall_s
        usage = {
            json.dumps(["usage", one], ensure_ascii=False): {"gpu_s": s, "at_s": at_s}
            for one, s in self._usage_gpu_s.items()
        }
        records = {**self.forecasts.changed(), **usage}
        if records:
            try:
                await self._store.save_learned(records)
            except BaseException:
                self.forecasts.not_kept()
                raise

    def begun(self, state: ClusterState, row: AssignmentRow) -> None:
        """Note that an assignment was made."""
        self.forecasts.begun(state.tasks[row.task_id], row, state.nodes[row.node_id].spec.gpu_kind)

    def heard(self, state: ClusterState, facts: PlanFacts, node_id: str, reported: Sequence[Reported]) -> bool:
        """Learn from a heartbeat; return whether a task will end so much sooner or later that a new plan is due."""
        now = self._clock()
        moved = False
        slower = slowdowns(state.guests(node_id), state, self.forecasts)
        for status in reported:
            row = state.assignments.get(status.assignment_id)
            if row is None or row.node_id != node_id or row.epoch != status.epoch:
                continue
            task, kind = state.tasks[row.task_id], state.nodes[node_id].spec.gpu_kind
            slowdown = slower.get(row.assignment_id)
            self.forecasts.heard(task, row, kind, status.progress, now, has_guests=slowdown is not None)
            planned = facts.ends.get(row.task_id)
            if planned is not None and row.stop is None:
                outlook = self.forecasts.outlook(task, row, kind, status.progress, now, slowdown or 1.0)
                left_s = outlook.left_at(now.wall_s).expected_s
                off_s = abs(now.wall_s + left_s - planned.expected_s)
                moved = moved or off_s > max(MOVED_S, MOVED_SHARE * left_s)
        return moved

    def ended(self, state: ClusterState, changes: Changes) -> None:
        """Learn from assignments that end with these changes of a state that does not have them yet."""
        tasks = {task.task_id: task for task in changes.tasks}
        for row in changes.assignments:
            node = state.nodes.get(row.node_id)
            task = tasks.get(row.task_id) or state.tasks.get(row.task_id)
            if row.outcome is not None and node is not None and task is not None:
                self.forecasts.ended(task, row, node.spec.gpu_kind)

    def usage(self, state: ClusterState) -> Mapping[str, float]:
        """Return each tenant's GPU-seconds until now, older ones counting less."""
        now_s = self._clock().monotonic_s
        elapsed_s, self._counted_s = now_s - self._counted_s, now_s
        held: defaultdict[str, int] = defaultdict(int)
        tasks = state.tasks
        for row in state.assignments.values():
            held[tasks[row.task_id].tenant] += len(row.gpu_indices)
        for tenant in self._usage_gpu_s.keys() | held.keys():
            self._usage_gpu_s[tenant] = accrued(self._usage_gpu_s.get(tenant, 0.0), held.get(tenant, 0), elapsed_s)
        return self._usage_gpu_s
