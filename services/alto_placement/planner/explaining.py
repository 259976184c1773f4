"""Why a task is where it is: the first thing that keeps it from running now, and what would change that."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import alto_planner

from alto_placement.planner.answers import Placements
from alto_placement.planner.fitting import matches, widest_fit
from alto_placement.planner.model import (
    Change,
    ChangeKind,
    Choice,
    Explanation,
    NodeState,
    Placement,
    RunningTask,
    Snapshot,
    WaitingTask,
    WaitReason,
)

MOST_NAMED = 8


class Explainer:
    """Explains one plan. Figures that all explanations share are worked out once, on the first question."""

    def __init__(
        self,
        snapshot: Snapshot,
        read: alto_planner.ReadSnapshot,
        solution: alto_planner.Solution,
        placements: Placements,
    ) -> None:
        self._snapshot = snapshot
        self._read = read
        self._solution = solution
        self._placements = placements

    @cached_property
    def _free_before(self) -> dict[str, int]:
        """Free GPUs of each ready node before the plan's orders."""
        free = self._read.free_now()
        return {node.node_id: free[i].bit_count() for i, node in enumerate(self._snapshot.nodes)}

    @cached_property
    def _free_after(self) -> dict[str, int]:
        """Free GPUs of each ready node once the plan's orders are carried out."""
        free = dict(self._free_before)
        for placement in self._placements.starting():
            for part in placement.parts if not placement.host_task_id else ():
                free[part.node_id] -= len(part.gpu_indices)
        return free

    @cached_property
    def _running_on(self) -> dict[str, list[RunningTask]]:
        """What runs on each node."""
        found: dict[str, list[RunningTask]] = {}
        for running in self._snapshot.running:
            for part in running.parts:
                found.setdefault(part.node_id, []).append(running)
        return found

    @cached_property
    def _held(self) -> dict[str, int]:
        """GPUs that each tenant holds once the plan's orders are carried out."""
        held: dict[str, int] = {}
        for running in self._snapshot.running:
            if not running.guest_of:
                count = sum(len(part.gpu_indices) for part in running.parts)
                held[running.tenant] = held.get(running.tenant, 0) + count
        tenant_of = {task.task_id: task.tenant for task in self._snapshot.waiting}
        for placement in self._placements.starting():
            if not placement.host_task_id:
                tenant = tenant_of[placement.task_id]
                held[tenant] = held.get(tenant, 0) + sum(len(part.gpu_indices) for part in placement.parts)
        return held

    def explain(self, index: int) -> Explanation:
        """Return the explanation for the snapshot's waiting task number `index`."""
        task = self._snapshot.waiting[index]
        placement = self._placements.of(index)
        choice = task.choices[placement.choice] if placement else task.choices[0]
        reason = self._reason(task, choice, placement)
        waits_for = self._waits_for(index, placement) if reason is not WaitReason.STARTS_NOW else ()
        largest = max(widest_fit(option, self._snapshot.nodes) for option in task.choices)
        return Explanation(
            reason=reason,
            waits_for=waits_for,
            ahead=self._solution.ahead(index),
            predicted_start_s=placement.start_s if placement else None,
            predicted_end_s=placement.end_s if placement else None,
            latest_end_s=placement.start_s + choice.duration.upper_s if placement else None,
            deadline_s=self._deadline(task),
            changes=self._changes(reason, task, choice, waits_for),
            largest_fit_gpus=largest if reason is WaitReason.NEVER_FITS else None,
        )

    def explain_join(self, task: WaitingTask, joined: Placement) -> Explanation:
        """Return the explanation for a task that joins a running executor."""
        return Explanation(
            reason=WaitReason.JOINS_EXECUTOR,
            shares_with=(joined.host_task_id, *self._guests_of(joined.host_task_id)),
            predicted_start_s=joined.start_s,
            predicted_end_s=joined.end_s,
            latest_end_s=joined.start_s + task.choices[joined.choice].duration.upper_s,
            deadline_s=self._deadline(task),
        )

    def _guests_of(self, host_task_id: str) -> list[str]:
        return [running.task_id for running in self._snapshot.running if running.guest_of == host_task_id]

    def _deadline(self, task: WaitingTask) -> float:
        return task.arrived_s + self._read.patience_s(min(choice.duration.expected_s for choice in task.choices))

    def _reason(self, task: WaitingTask, choice: Choice, placement: Placement | None) -> WaitReason:
        if placement is not None and placement.start_s <= self._snapshot.now_s:
            return WaitReason.STARTS_NOW
        if not any(option.gpus <= widest_fit(option, self._snapshot.nodes) for option in task.choices):
            return WaitReason.NEVER_FITS
        ready = [node for node in self._snapshot.nodes if node.state is NodeState.READY]
        if not any(option.gpus <= widest_fit(option, ready) for option in task.choices):
            return WaitReason.NO_NODE_READY
        if task.not_before_s > self._snapshot.now_s:
            return WaitReason.HELD_BACK
        if placement is None or self._over_quota(task, choice):
            return WaitReason.QUOTA
        if self._fits(choice, self._free_after):
            return WaitReason.RESERVED if self._snapshot.reservations else WaitReason.TURN_OF_OTHERS
        if self._fits(choice, self._free_before):
            return WaitReason.TURN_OF_OTHERS
        return WaitReason.FRAGMENTED if self._free(choice) >= choice.gpus else WaitReason.GPUS_BUSY

    def _over_quota(self, task: WaitingTask, choice: Choice) -> bool:
        row = next((tenant for tenant in self._snapshot.tenants if tenant.tenant == task.tenant), None)
        if row is None or row.quota_gpus is None:
            return False
        wanted = self._held.get(task.tenant, 0) + choice.gpus
        if wanted <= row.quota_gpus:
            return False
        if not row.cohort or (row.borrow_gpus is not None and wanted > row.quota_gpus + row.borrow_gpus):
            return True
        cohort = [tenant for tenant in self._snapshot.tenants if tenant.cohort == row.cohort]
        if any(tenant.quota_gpus is None for tenant in cohort):
            return False
        owned = sum(tenant.quota_gpus or 0 for tenant in cohort)
        return sum(self._held.get(tenant.tenant, 0) for tenant in cohort) + choice.gpus > owned

    def _fits(self, choice: Choice, free: Mapping[str, int]) -> bool:
        widths = [free[node.node_id] for node in self._snapshot.nodes if matches(choice, node)]
        widest = max((node.gpus for node in self._snapshot.nodes if matches(choice, node)), default=0)
        if choice.gpus <= widest:
            return max(widths, default=0) >= choice.gpus
        whole = sum(1 for node in self._snapshot.nodes if matches(choice, node) and free[node.node_id] == node.gpus)
        return whole * widest >= choice.gpus

    def _free(self, choice: Choice) -> int:
        return sum(self._free_after[node.node_id] for node in self._snapshot.nodes if matches(choice, node))

    def _waits_for(self, index: int, placement: Placement | None) -> tuple[str, ...]:
        if placement is None:
            return ()
        wanted = {part.node_id: set(part.gpu_indices) for part in placement.parts}
        blockers: list[tuple[float, str]] = []
        here = {one.task_id: one for node_id in wanted for one in self._running_on.get(node_id, ())}
        for running in here.values():
            if any(wanted.get(part.node_id, set()).intersection(part.gpu_indices) for part in running.parts):
                blockers.append((running.expected_end_s, running.task_id))
        for other in self._solution.predecessors(index):
            before = self._placements.of(other)
            if before is not None:
                blockers.append((before.end_s, before.task_id))
        return tuple(task_id for _, task_id in sorted(blockers)[:MOST_NAMED])

    def _changes(
        self, reason: WaitReason, task: WaitingTask, choice: Choice, waits_for: tuple[str, ...]
    ) -> tuple[Change, ...]:
        changes: list[Change] = []
        if reason is WaitReason.HELD_BACK:
            changes.append(Change(ChangeKind.TIME, task.not_before_s))
        if reason in (WaitReason.NO_NODE_READY, WaitReason.NEVER_FITS):
            changes.append(Change(ChangeKind.NODE_READY))
        if reason is WaitReason.NEVER_FITS:
            changes.append(
                Change(ChangeKind.FEWER_GPUS, max(widest_fit(c, self._snapshot.nodes) for c in task.choices))
            )
        if reason is WaitReason.QUOTA:
            quotas = {tenant.tenant: tenant.quota_gpus or 0 for tenant in self._snapshot.tenants}
            missing = self._held.get(task.tenant, 0) + choice.gpus - quotas.get(task.tenant, 0)
            changes.append(Change(ChangeKind.MORE_QUOTA, max(1, missing)))
        if reason in (WaitReason.GPUS_BUSY, WaitReason.FRAGMENTED, WaitReason.TURN_OF_OTHERS, WaitReason.RESERVED):
            if waits_for:
                changes.append(Change(ChangeKind.TASKS_END))
            narrower = max((self._free_after[n.node_id] for n in self._snapshot.nodes if matches(choice, n)), default=0)
            if 0 < narrower < choice.gpus:
                changes.append(Change(ChangeKind.FEWER_GPUS, narrower))
            if narrower < choice.gpus:
                changes.append(Change(ChangeKind.MORE_GPUS, choice.gpus - narrower))
        if reason is WaitReason.TURN_OF_OTHERS:
            priorities = {row.task_id: row.priority for row in self._snapshot.waiting}
            starting = [priorities[row.task_id] for row in self._placements.starting() if not row.host_task_id]
            changes.append(Change(ChangeKind.HIGHER_PRIORITY, max(starting, default=task.priority) + 1))
        return tuple(changes)
